"""What images are worth: feature networks, Frechet distances, PSNR and SSIM."""
