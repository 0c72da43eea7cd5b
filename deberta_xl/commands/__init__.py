"""What stands behind the commands that people type: their arguments and inputs, checked; a run described, assembled."""
