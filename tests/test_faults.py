"""What can be wrong, case by case: each has its test, here or in the file of its subject."""

import ast
import os
from pathlib import Path

import pytest
from PIL import Image

TESTS = Path(__file__).parent

# Each fault with what the user gets, and the tests that show it
FAULTS: dict[int, tuple[str, str]] = {
    # Arguments
    1: ("--W 500: refused with the nearest multiples of 8", "cli.bad_options_are_refused_in_one_line"),
    2: ("--steps 0, abc, 1e9: refused", "cli.bad_options_are_refused_in_one_line"),
    3: ("--scale nan, inf: refused", "cli.bad_options_are_refused_in_one_line"),
    4: ("a strength that runs no step: refused with one that does", "img2img.bad_options"),
    5: ("--sampler eulr: refused with the nearest name", "cli.bad_options_are_refused_in_one_line"),
    6: ("guidance with a sampler that it cannot use: refused with those it can", "guidance.refusals"),
    7: (
        "--fp16 --bf16 refused, --fp16 on a CPU warned of",
        "cli.bad_options_are_refused_in_one_line cli.what_the_machine_cannot_do_is_warned_of",
    ),
    8: (
        "--ckpt missing, a glob with none or several: refused; never asked of the Hub",
        "models.globs_match_one_file models.a_path_that_is_not_there_is_never_asked_of_the_hub",
    ),
    9: ("numbers of modules, weights, multipliers that do not pair up", "networks.numbers_that_do_not_pair_up"),
    10: (
        "--outdir a file or read-only: refused",
        "cli.output_folders_that_are_none cli.an_output_folder_that_cannot_be_written_to",
    ),
    11: ("--batch_size 0, --seed -1, two sources of prompts: refused", "cli.bad_options_are_refused_in_one_line"),
    # Prompt lines
    12: ("byte-order mark before a comment: fine", "plan.prompt_files_keep_line_numbers"),
    13: ("UTF-16, cp932: refused with line and byte", "plan.prompt_files_that_cannot_be_used"),
    14: ("blank lines, spaces, comments: fine, line numbers kept", "plan.prompt_files_keep_line_numbers"),
    15: ("nothing but comments: refused", "plan.prompt_files_that_cannot_be_used"),
    16: ("U+2028, VT, FF inside a line: one prompt", "plan.prompt_files_keep_line_numbers"),
    17: ("faults in prompt options: line and column", "prompts.faults_in_options_name_line_and_column"),
    18: ("a long dash: warned of", "prompts.an_option_with_a_long_dash_is_text_with_a_warning"),
    19: (
        "--w 512x768, --h 512.9: refused",
        "faults.sizes_in_prompt_lines cli.faults_in_a_prompt_file_name_the_line",
    ),
    20: ("unclosed and unmatched brackets: text", "prompts.emphasis"),
    21: (
        "odd weights, 200 brackets: finite",
        "prompts.weights_stay_finite_and_letters_are_kept prompts.deep_nesting_is_bounded",
    ),
    22: ("odd variant groups", "prompts.odd_groups_have_a_meaning prompts.faults_in_groups"),
    23: (
        "an unclosed brace with 10,000 variants: answered at once",
        "prompts.an_unclosed_brace_of_many_variants_takes_linear_time",
    ),
    24: (
        "ten million prompts, 10,000 tokens, NUL",
        "faults.more_prompts_than_anybody_wants text_encoding.what_is_cut_off_is_shown "
        "plan.prompt_files_that_cannot_be_used",
    ),
    # Model files
    25: ("a .ckpt that runs code: refused, nothing runs", "weight_files.a_pickle_that_would_run_code_does_not"),
    26: ("the same under other names", "weight_files.a_pickle_that_would_run_code_does_not"),
    27: (
        "an honest .ckpt: fine",
        "weight_files.an_honest_checkpoint_with_what_training_leaves "
        "weight_files.older_checkpoints_with_what_training_leaves",
    ),
    28: ("truncated safetensors: bytes expected and found", "weight_files.truncated_and_trailing_bytes_are_told_apart"),
    29: ("trailing bytes: another sentence", "weight_files.truncated_and_trailing_bytes_are_told_apart"),
    30: (
        "empty, web page, LFS pointer, zip: named",
        "weight_files.other_files_are_named weight_files.a_zip_of_something_else",
    ),
    31: ("impossible headers: refused without allocation", "weight_files.other_files_are_named"),
    32: ("SDXL, SD3, Flux: named", "models.files_of_other_kinds_are_named"),
    33: (
        "the other family refused, the prediction type in doubt warned of",
        "models.a_wrong_family_option_is_refused models.a_prediction_type_in_doubt_is_warned_of",
    ),
    34: ("U-Nets of 9 and 8 channels: refused", "models.unets_for_more_than_text_are_refused"),
    35: ("a LoRA of another family: refused, keys counted", "network_names.files_for_widths_that_no_layer_here_has"),
    36: ("a partial match: warned of with numbers", "networks.keys_without_a_layer_are_counted"),
    37: (
        "NaN in weights: the tensor named",
        "models.weights_that_are_no_numbers_are_named networks.broken_weights_name_their_tensor",
    ),
    38: (
        "embedding, ControlNet, VAE of another family",
        "models.vaes_of_other_families_are_refused control_net.another_familys_control_net",
    ),
    # Pictures
    39: ("cut in half: refused", "pictures.pictures_cut_short_are_refused"),
    40: ("30,000 x 30,000 pixels: refused from the header", "pictures.a_huge_picture_is_refused_from_its_header"),
    41: ("EXIF orientations: upright", "pictures.exif_orientations_are_applied"),
    42: ("transparency: on white", "pictures.transparency_is_white"),
    43: (
        "16 bits, CMYK, animations: fine",
        "pictures.sixteen_bits_and_four_inks pictures.of_an_animation_the_first_frame",
    ),
    44: ("1 x 1, 7 x 5000: refused", "pictures.pictures_of_unusable_sizes"),
    45: (
        "a mask of another size resized, a black one warned of",
        "img2img.a_black_mask_is_warned_of img2img.soft_masks_blend",
    ),
    46: (
        "2,000 pictures, .PNG, brackets in the path: fine, few open files",
        "faults.thousands_of_pictures pictures.nothing_found",
    ),
    47: ("text named .png, HEIC: refused", "pictures.other_files_named_like_pictures"),
    48: (
        "prompts expected from a picture that has none: named",
        "pictures.a_picture_without_a_prompt pictures.prompts_of_the_web_ui_in_exif",
    ),
    # During a run
    49: (
        "disk full: the run stops, nothing is harmed, resume completes",
        "output.a_full_disk_leaves_no_fragment resume.a_full_disk_leaves_a_run_that_can_be_resumed",
    ),
    50: (
        "kill -9 at any moment",
        "resume.killed_at_any_moment resume.killed_at_random_moments resume.a_torn_line_is_passed_over",
    ),
    51: (
        "Ctrl-C once and twice",
        "runs.an_interruption_finishes_the_batch_in_hand runs.a_second_interruption_stops_at_once",
    ),
    52: (
        "names that are taken: nothing overwritten",
        "output.two_processes_in_one_folder output.existing_files_are_left_alone output.a_taken_name_gets_a_number",
    ),
    53: (
        "resume with other prompts, model, options: named",
        "resume.changed_options_are_named resume.changed_prompts_are_named resume.another_model_is_named",
    ),
    54: (
        "out of memory in the U-Net",
        "runs.batches_are_halved_until_they_fit runs.a_picture_too_large_alone_fails_and_the_others_go_on "
        "runs.no_memory_at_all_ends_the_run runs.a_real_lack_of_memory_is_told_from_other_errors",
    ),
    55: ("out of memory in the VAE", "runs.the_vae_goes_one_by_one runs.the_vae_goes_in_tiles"),
    56: (
        "NaN: once more in float32, no black picture",
        "pipeline.nan_is_no_black_picture pipeline.a_vae_that_overflows_decodes_in_float32",
    ),
    57: (
        "network blocked",
        "models.local_files_open_no_socket models.a_model_that_is_nowhere_names_the_file "
        "models.a_model_of_the_hubs_cache_needs_no_network",
    ),
    58: (
        "no display: preview off",
        "interactive.without_a_display_there_is_one_warning interactive.a_display_that_cannot_be_reached",
    ),
    59: ("versions that do not fit: found and wanted", "cli.libraries_of_other_versions_are_refused"),
    60: (
        "a process of several dies",
        "processes.when_one_dies_the_launcher_stops_the_rest_and_resume_completes "
        "processes.one_that_gives_up_does_not_keep_the_first_waiting "
        "fleet.a_killed_worker_leaves_no_trace_in_the_pictures",
    ),
}


NOT_THERE_YET: set[int] = set()  # features whose options are refused as unknown


def test_no_case_is_missing():
    assert sorted(FAULTS) == list(range(1, 61))
    assert {number for number, (_, tests) in FAULTS.items() if not tests} == NOT_THERE_YET


@pytest.mark.parametrize("number", FAULTS)
def test_every_case_has_its_tests(number):
    for name in FAULTS[number][1].split():
        subject, _, test = name.partition(".")
        tree = ast.parse((TESTS / f"test_{subject}.py").read_text(encoding="utf-8"))
        assert f"test_{test}" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--w 512x768", "--h 512.9", "--w 1e3", "--h ５１２"])
def test_sizes_in_prompt_lines(sd1, generate, option):
    result = generate(sd1.folder, "--prompt", f"a cat {option}")
    assert result.status == 2
    assert f"{option} (column 7): not a whole number" in result.stderr


def test_more_prompts_than_anybody_wants(sd1, generate, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("fine\n" + "{e$$0|1|2|3|4|5|6|7|8|9}" * 7 + "\n")
    result = generate(sd1.folder, "--from_file", file)
    assert result.status == 2
    assert f"({file}:2): " in result.stderr
    assert "combinations or more" in result.stderr


def test_thousands_of_pictures(sd1, generate, tmp_path):
    resource = pytest.importorskip("resource")
    folder = tmp_path / "some [x] pictures"
    folder.mkdir()
    for number in range(2000):
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(folder / f"{number:04}.PNG")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))  # noqa: PTH208
    try:
        options = ("--image_path", folder, "--prompt", "a", "--images_per_prompt", 2000, "--dry_run", "--json")
        result = generate(sd1.folder, *options, "--strength", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result.status == 0
    assert len(result.stdout.splitlines()) == 2000
