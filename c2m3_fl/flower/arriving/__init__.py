"""What is computed while clients still train: of the model that was sent, and of every reply as it arrives."""
