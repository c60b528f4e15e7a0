"""The shipped presets by kind, and what is known of them elsewhere."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IDS = sorted(path.stem for path in (ROOT / "defaults").glob("*.json"))

# Facts of Wan2GP's own presets of the same ids (defaults/*.json at 8681e9f7).
WAN2GP = {
    "z_image": {
        "architecture": "z_image",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/ZImageTurbo_bf16.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 8,
            "guidance_scale": 0,
        },
    },
    "z_image_base": {
        "architecture": "z_image_base",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/ZImageBase_bf16.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 30,
            "guidance_scale": 4,
            "flow_shift": 6.0,
        },
    },
    "z_image_twinflow_turbo": {
        "architecture": "z_image",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/TwinFlow-Z-Image-Turbo_bf16.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 2,
            "guidance_scale": 0,
        },
    },
    "z_image_nunchaku_r256_int4": {
        "architecture": "z_image",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/svdq-int4_r256-z-image-turbo.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 8,
            "guidance_scale": 0,
        },
    },
    "z_image_nunchaku_r128_fp4": {
        "architecture": "z_image",
        "first_url": "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/svdq-fp4_r128-z-image-turbo.safetensors",
        "settings": {
            "resolution": "1024x1024",
            "batch_size": 1,
            "num_inference_steps": 8,
            "guidance_scale": 0,
        },
    },
}

# Which reader opens each packed preset's transformer, and what its file's name and description say of the format.
PACKED = {
    "z_image_int8": ("quanto_int8", r"ZImageTurbo_quanto_bf16_int8\.safetensors", "8-bit integer weights"),
    "z_image_base_int8": ("quanto_int8", r"ZImageBase_quanto_bf16_int8\.safetensors", "8-bit integer weights"),
    "z_image_nunchaku_r32_int4": ("svdq", r"svdq-int4_r32-.*\.safetensors", "4-bit integers.* rank 32 "),
    "z_image_nunchaku_r128_int4": ("svdq", r"svdq-int4_r128-.*\.safetensors", "4-bit integers.* rank 128 "),
    "z_image_nunchaku_r256_int4": ("svdq", r"svdq-int4_r256-.*\.safetensors", "4-bit integers.* rank 256 "),
    "z_image_nunchaku_r32_fp4": ("svdq", r"svdq-fp4_r32-.*\.safetensors", "4-bit floats.* rank 32 "),
    "z_image_nunchaku_r128_fp4": ("svdq", r"svdq-fp4_r128-.*\.safetensors", "4-bit floats.* rank 128 "),
    "z_image_nvfp4_mixed": ("nvfp4", r"z_image_turbo_nvfp4\.safetensors", "NVFP4, with MXFP8"),
    "z_image_fp8_scaled": ("fp8_scaled", r".*_fp8_scaled_e4m3fn_.*\.safetensors", r"8-bit float weights \(e4m3\)"),
    "z_image_fp8": ("fp8_plain", r"z-image-turbo-fp8-e4m3fn\.safetensors", r"8-bit floats \(e4m3\) without scales"),
    "z_image_fp8_e5m2": ("fp8_plain", r"z-image-turbo-fp8-e5m2\.safetensors", r"8-bit floats \(e5m2, .*without scales"),
    "z_image_aio_fp8": ("fp8_plain", r"z-image-turbo-fp8-aio\.safetensors", r"in one file.* without scales"),
    "z_image_mxfp8": ("mxfp8", r"zImageTurbo-mxfp8\.safetensors", "MXFP8 .* bf16 for critical layers"),
    "z_image_comfy_int8": ("comfy_int8", r"z_image_turbo_int8_convrot\.safetensors", "int8 file.* rotated"),
    "z_image_gguf_q8_0": ("gguf", r".*-Q8_0\.gguf", "GGUF file, 8 bits"),
    "z_image_gguf_q6_k": ("gguf", r".*-Q6_K\.gguf", "GGUF file, 6 bits"),
    "z_image_gguf_q5_k_m": ("gguf", r".*-Q5_K_M\.gguf", "GGUF file, 5 and 6 bits"),
    "z_image_gguf_q4_k_m": ("gguf", r".*-Q4_K_M\.gguf", "GGUF file, 4 to 6 bits"),
    "z_image_gguf_q4_0": ("gguf", r".*-Q4_0\.gguf", "GGUF file of stable-diffusion.cpp, 4 bits"),
}

# The ControlNet of each preset that has one: gigabytes of its bf16 file, and its name in Wan2GP's preset of the same
# id (defaults/*.json at 8681e9f7; for 8 steps Wan2GP pairs a Tile file with a Union one, which is not repeated here).
CONTROL = {
    "z_image_control": (3.1, "Z-Image-Turbo-Fun-Controlnet-Union_bf16.safetensors"),
    "z_image_control2": (6.7, "Z-Image-Turbo-Fun-Controlnet-Union2_bf16.safetensors"),
    "z_image_control2_1": (6.7, "Z-Image-Turbo-Fun-Controlnet-Union2.1_bf16.safetensors"),
    "z_image_control2_1_8s": (6.7, None),
    "z_image_control2_1_lite": (2.0, None),
    "z_image_control2_1_tile": (6.7, None),
    "z_image_base_control2_1": (6.7, None),
}
PLAIN = ("z_image", "z_image_base", "z_image_twinflow_turbo", "z_image_comfy_bf16", "z_image_base_comfy_bf16")
BIG = [*PLAIN, *PACKED]


def file_name(url: str) -> str:
    return url.rpartition("/")[2]
