"""Every size of a model at a glance, before it is pruned to one."""
