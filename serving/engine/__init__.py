"""Engines that turn token ids into token ids, behind the seam of :mod:`serving.engine.base`."""
