"""MAGE: text-image-to-video generation with motion anchors, from simulator to figures."""
