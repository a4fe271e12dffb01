"""What methods learn from and what models are measured on: text, images and speech as batches of model inputs."""
