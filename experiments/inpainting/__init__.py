"""An inpainting teacher on CIFAR-10 at 16 x 16, distilled and compared with its own solvers at equal network calls."""
