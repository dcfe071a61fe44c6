"""From a profile and a topology to cuts, replicas and a weight policy, by a hierarchical dynamic program."""
