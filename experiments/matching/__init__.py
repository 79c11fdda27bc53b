"""Distribution matching as a second stage on CIFAR-10, compared with the map alone and with DMD2, in equal seconds."""
