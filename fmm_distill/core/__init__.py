"""The mathematics: time axis, schedules, flow maps, derivatives and solvers. It needs torch alone."""
