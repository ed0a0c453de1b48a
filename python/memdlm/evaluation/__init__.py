"""What a trained model can do: probes of long context, losses and likelihoods."""
