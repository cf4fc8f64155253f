"""python -m torch_soap"""

from torch_soap.cli import main

main()
