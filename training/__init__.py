"""What train.py is made of: configuration, set-up, optimizers, run log, plan, sharding."""
