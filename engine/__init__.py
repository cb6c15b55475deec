"""What generate.py is built from: sampling, scheduling, the forward step, and likelihoods."""
