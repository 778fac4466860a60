"""The DeepMind Control suite: its tasks, their images, what shrinks and what distracts, without torch."""
