"""The recurrent state-space model: latents, one step, a sequence, imagination."""
