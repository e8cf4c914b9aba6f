"""Measures of image quality: feature networks, Frechet distances, PSNR and SSIM."""
