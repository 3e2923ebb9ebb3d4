//! The files in which QEMU saves the RAM of a paused guest, and those that debuggers read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::json;

use super::guest::{Guest, RAM, Room};
use super::tool::Ramsnap;

/// From here on, QEMU's `pc` has nothing but RAM.
const FIRST: u64 = 1 << 20;

/// Checks the files of a paused guest whose RAM is in the file `ram`.
pub(super) fn check(room: &Room<'_>, ramsnap: &Ramsnap, guest: &mut Guest) -> anyhow::Result<()> {
    let ram = File::open(room.file("ram"))?;
    elf_of_qemu(room, ramsnap, guest, &ram).context("QEMU's ELF core")?;
    elf_of_ramsnap(room, ramsnap, &ram).context("the ELF core of ramsnap")?;
    mapped_ram(room, ramsnap, guest, &ram).context("QEMU's mapped-ram")
}

/// QEMU dumps the guest, and the image of the core has the bytes of the RAM.
fn elf_of_qemu(
    room: &Room<'_>,
    ramsnap: &Ramsnap,
    guest: &mut Guest,
    ram: &File,
) -> anyhow::Result<()> {
    let core = room.file("qemu.elf");
    let arguments = json!({"paging": false, "protocol": "file:qemu.elf"});
    guest.qmp.execute("dump-guest-memory", arguments)?;
    let image = room.file("qemu.mem");
    ramsnap.convert(&format!("elf:{}", core.display()), &image, &[])?;
    let mut start = 0;
    for (address, len) in ramsnap.regions(&image)? {
        if (address..address + len).contains(&FIRST) {
            let raw = room.file("qemu.raw");
            ramsnap.convert(&image.display().to_string(), &raw, &["--layout", "raw"])?;
            let left = address + len - FIRST;
            ensure!(
                left == RAM - FIRST,
                "it has {left} bytes of RAM from {FIRST:#x} on"
            );
            same(
                &File::open(raw)?,
                start + (FIRST - address),
                ram,
                FIRST,
                left,
            )?;
            println!(
                "ELF core of QEMU {}: the image has its RAM",
                guest.qmp.version
            );
            return Ok(());
        }
        start += len;
    }
    bail!("no region of the core has the address {FIRST:#x}")
}

/// gdb reads the RAM in a core that ramsnap wrote, and drgn finds the kernel in it.
fn elf_of_ramsnap(room: &Room<'_>, ramsnap: &Ramsnap, ram: &File) -> anyhow::Result<()> {
    let core = room.file("guest.elf");
    let raw = format!("raw:{}", room.file("ram").display());
    ramsnap.convert(&raw, &core, &["--to", "elf", "--guest", "qemu-pc"])?;
    let mut word = [0; 8];
    ram.read_exact_at(&mut word, 2 * FIRST)?;
    let expected = format!("{:#018x}", u64::from_le_bytes(word));
    let read = format!("x/1gx {:#x}", 2 * FIRST);
    let mut gdb = Command::new("gdb");
    let open = format!("core-file {}", core.display());
    gdb.args(["-batch", "-nx", "-ex", &open, "-ex", &read]);
    match gdb.output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(
                said.contains(&expected),
                "gdb reads no {expected}: {said:?}"
            );
            println!("ELF core of ramsnap: gdb reads its RAM");
        }
        Err(error) => println!("ELF core of ramsnap: not read by gdb: {error}"),
    }
    let script = room.file("kernel.py");
    let lines = "import drgn, sys\nprog = drgn.Program()\nprog.set_core_dump(sys.argv[-1])\n\
                 print(prog.flags, prog['UTS_RELEASE'].string_().decode())\n";
    std::fs::write(&script, lines)?;
    let mut drgn = Command::new("drgn");
    drgn.args(["--no-default-symbols", "-q", "-c"])
        .arg(&core)
        .arg(&script)
        .arg(&core);
    match drgn.output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let release = &room.kit.release;
            ensure!(
                said.contains(release.as_str()),
                "drgn finds no {release}: {output:?}"
            );
            println!("ELF core of ramsnap: drgn finds Linux {release}");
        }
        Err(error) => println!("ELF core of ramsnap: not read by drgn: {error}"),
    }
    Ok(())
}

/// QEMU migrates the guest to a file with `mapped-ram`, and the image has the bytes of the RAM.
fn mapped_ram(
    room: &Room<'_>,
    ramsnap: &Ramsnap,
    guest: &mut Guest,
    ram: &File,
) -> anyhow::Result<()> {
    if let Err(refusal) = guest.save_mapped("mapped") {
        // Debian 12 has QEMU 7.2, and QEMU 9.0 is the first version with mapped-ram.
        let version = &guest.qmp.version;
        let is_old = version
            .split('.')
            .next()
            .and_then(|major| major.parse::<u32>().ok());
        ensure!(is_old.is_some_and(|major| major < 9), "{refusal:#}");
        println!("mapped-ram: QEMU {version} does not have it");
        return Ok(());
    }
    let (file, image, raw) = (
        room.file("mapped"),
        room.file("mapped.mem"),
        room.file("mapped.raw"),
    );
    let file = format!("qemu:{}", file.display());
    // The name of the memory backend depends on the machine type.
    let named = |block: &str| ramsnap.convert(&file, &image, &["--ram-block", block]);
    named("/objects/m").or_else(|_| named("m"))?;
    ramsnap.convert(&image.display().to_string(), &raw, &["--layout", "raw"])?;
    same(&File::open(raw)?, 0, ram, 0, RAM)?;
    println!(
        "mapped-ram of QEMU {}: the image has its RAM",
        guest.qmp.version
    );
    Ok(())
}

/// Checks that two files have the same `len` bytes, each at its own offset.
fn same(one: &File, at: u64, other: &File, other_at: u64, len: u64) -> anyhow::Result<()> {
    let (mut here, mut there) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for step in (0..len).step_by(1 << 20) {
        let size = (len - step).min(1 << 20) as usize;
        one.read_exact_at(&mut here[..size], at + step)?;
        other.read_exact_at(&mut there[..size], other_at + step)?;
        ensure!(
            here[..size] == there[..size],
            "the bytes differ after {:#x}",
            other_at + step
        );
    }
    Ok(())
}
