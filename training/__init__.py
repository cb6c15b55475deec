"""The parts of train.py: configuration, set-up, loss, optimizers, run log, plan and sharding."""
