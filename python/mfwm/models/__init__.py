"""World model, its heads and its rollouts; video tokenizer; latent actions. They need torch and the ops alone."""
