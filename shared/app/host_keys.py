"""Names of Wan2GP's keys that this program reads without using them, so that its files load without
complaint.

Source: models/_settings.json, docs/SETTINGS.md, docs/FINETUNES.md and the definition keys that wgp.py reads,
at 8681e9f7.
"""

from __future__ import annotations

# Generation settings, carried along and written back.
HOST_SETTING_KEYS = frozenset(
    """
    alt_guidance_scale alt_prompt alt_scale apg_switch attention_sparsity audio_guidance_scale
    audio_guide audio_guide2 audio_prompt_type audio_scale audio_source cfg_star_switch cfg_zero_step
    client_id config control_net_weight2 control_net_weight_alt custom_guide custom_settings
    duration_seconds embedded_guidance_scale film_grain_intensity film_grain_saturation force_fps
    frames_positions guidance2_scale guidance3_scale guidance_phases image_end
    image_mode image_prompt_type image_refs_relative_size input_video_strength
    keep_frames_video_guide keep_frames_video_source keep_intermediate_sliding_windows lset_name
    masking_strength min_frames_if_references model_mode model_switch_phase motion_amplitude
    multi_images_gen_type output_filename override_attention override_profile
    pause_seconds perturbation_end_perc perturbation_layers perturbation_start_perc perturbation_switch
    postprocess_audio postprocess_audio_neg_prompt postprocess_audio_prompt prompt_enhancer
    remove_background_images_ref repeat_generation replace_voice_method replace_voice_sample
    replace_voice_sample2 RIFLEx_setting self_refiner_certain_percentage self_refiner_f_uncertainty
    self_refiner_plan self_refiner_setting skip_steps_cache_type skip_steps_multiplier
    skip_steps_start_step_perc sliding_window_color_correction_strength
    sliding_window_discard_last_frames sliding_window_overlap sliding_window_overlap_noise
    sliding_window_size sliding_window_trim_first_frames spatial_upsampling speakers_locations
    sub_parallel_window_overlap sub_parallel_window_size switch_threshold switch_threshold2
    tea_cache_setting tea_cache_start_step_perc temperature temporal_upsampling top_k top_p video_guide
    video_guide2 video_guide_outpainting video_guide_outpainting_ratio video_length video_mask
    video_prompt_type video_source
    """.split()  # noqa: SIM905  a list would be one name a line
)

# What is saved beside the settings: facts about one picture, not settings of the next. "provenance"
# and "prompt_template" are our own.
RECORD_KEYS = frozenset(
    """
    base_model_type creation_date creation_timestamp enhanced_prompt generation_time image_quality mode
    model_filename model_type modules prompt_template provenance settings_version state transformer_loras_filenames
    transformer_loras_multipliers type video_quality
    """.split()  # noqa: SIM905  a list would be one name a line
)

# Keys of a preset's "model" part, handed on to the family's handler.
HOST_MODEL_KEYS = frozenset(
    """
    author auto_quantize batch_size_label cfg_star cfg_zero compile control_net_weight_alt_name
    control_net_weight_name control_net_weight_size custom_settings excluded_spatial_upsamplers
    finetune_source_model fit_into_canvas_image_refs flow_shift group guidance_max_phases
    guide_custom_choices guide_custom_choices_image guide_preprocessing image_batch_size_max
    image_outputs image_prompt_enhancer_instructions image_prompt_enhancer_max_tokens image_ref_choices
    image_video_prompt_type inference_steps infos inpaint_support inpaint_video_prompt_type
    lock_guidance_phases lock_inference_steps lora_multiplier_branches lora_multiplier_phases
    mask_preprocessing mask_strength_always_enabled model_modes module_source module_source2 NAG
    no_background_removal no_lora no_negative_prompt one_image_ref_needed parent_model_type
    preset_profiles_dir profile_type profiles_dir prompt_description prompt_enhancer_def prompt_infos
    resolutions resolutions_categories sample_solvers settings_dir source source2 supports_early_stop
    text_prompt_enhancer_instructions text_prompt_enhancer_max_tokens URLs2 vae_block_size
    vae_upsamplers video_guide_outpainting video_prompt_enhancer_instructions
    video_prompt_enhancer_max_tokens visible_phases
    """.split()  # noqa: SIM905  a list would be one name a line
)
