"""`provisioner image`: releases of images, from the recipe to the channel and out again.

What reads or moves a release goes through the API; what makes, checks or removes bytes works
at the service's machine, with its configuration.
"""

from .group import image as image
