"""What the docs site is built with: figures drawn from committed results, the CLI reference, the link checker."""
