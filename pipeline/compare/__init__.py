"""Every run of an experiment beside the others: collect, group, judge, write."""
