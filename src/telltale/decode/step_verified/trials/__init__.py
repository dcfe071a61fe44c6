"""Problems decoded under a policy with every drafted step labelled: running, keeping and judging them."""
