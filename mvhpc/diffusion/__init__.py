"""The mathematics: schedules, Gaussian and categorical diffusion, their joint, and samplers. Pure torch."""
