"""Groups, targets, schedule, importance, masks, and the cut."""
