"""What models are asked: data sets, generated problems, and mixtures of them."""
