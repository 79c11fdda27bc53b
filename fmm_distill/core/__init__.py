"""The mathematics: time axis, schedules, flow maps, derivatives and solvers. It depends on torch alone."""
