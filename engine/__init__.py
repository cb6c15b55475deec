"""What generate.py is made of: sampling, scheduling, the forward step in torch and in C++, likelihoods."""
