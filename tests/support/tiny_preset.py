"""The "model" part of a preset of the tiny model, whose files lie in the program folder's tiny/."""

TINY_PRESET = {
    "name": "Tiny",
    "architecture": "z_image",
    "URLs": ["file:tiny/transformer.safetensors"],
    "text_encoder_URLs": ["file:tiny/text_encoder/model.safetensors"],
    "text_encoder_folder": "file:tiny/text_encoder",
    "VAE_URLs": ["file:tiny/vae/diffusion_pytorch_model.safetensors"],
}
