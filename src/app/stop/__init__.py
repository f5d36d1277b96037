"""What ends a fit before its last step: a signal, or the study that it is a trial of."""
