"""What the builder writes into boot sectors and layouts, checked against GRUB's own rules."""

from __future__ import annotations

import struct

from provisioner.imaging.bootloader import (
    BOOT_CODE_BYTES,
    UEFI_CFG,
    grub_cfg,
    patched_boot_code,
    patched_core,
)
from provisioner.imaging.build import layout
from provisioner.imaging.recipe import find_recipe, load_recipe
from provisioner.imaging.rootfs import installed_packages

MIB = 1024 * 1024


def test_boot_code_names_the_core_image_and_ends_before_the_table() -> None:
    code = patched_boot_code(bytes(range(256)) * 2, 2048)
    assert len(code) == BOOT_CODE_BYTES
    assert struct.unpack_from("<Q", code, 0x5C) == (2048,)
    assert code[0x66:0x68] == b"\x90\x90"
    assert code[:0x5C] == bytes(range(0x5C))


def test_core_image_names_the_place_and_length_of_its_rest() -> None:
    core = patched_core(b"\x11" * 1300, 2048)
    assert len(core) == 3 * 512
    assert struct.unpack_from("<QHH", core, 500) == (2049, 2, 0x820)
    assert core[:500] == b"\x11" * 500
    assert core[512:1300] == b"\x11" * 788


def test_layout_is_aligned_fills_the_disk_and_ends_with_the_root() -> None:
    recipe = load_recipe(find_recipe("debian-12"))
    partitions = layout(recipe)
    assert [part.name for part in partitions] == ["bios", "esp", "root"]
    end = MIB
    for part in partitions:
        assert part.start_bytes == end
        assert part.size_bytes % MIB == 0
        end += part.size_bytes
    assert end == recipe.size_bytes - MIB


def test_boot_scripts_hold_what_the_kernel_needs() -> None:
    text = grub_cfg("debian-12 1", "0123-abcd", ("console=ttyS0,115200", "quiet"))
    assert "linux /vmlinuz root=PARTUUID=0123-abcd rw console=ttyS0,115200 quiet\n" in text
    assert "set timeout=0" in text
    assert "set root=($disk,gpt3)" in UEFI_CFG.format(root_number=3)


def test_only_installed_packages_are_listed() -> None:
    status = (
        "Package: a\nStatus: install ok installed\nVersion: 1:2.0-1\nDescription: x\n y: z\n\n"
        "Package: b\nStatus: deinstall ok config-files\nVersion: 1\n\n"
    )
    assert installed_packages(status) == {"a": "1:2.0-1"}
