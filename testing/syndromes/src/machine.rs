//! Runs the program in QEMU, and reads what it sends.

use anyhow::{Context, ensure};
use xshell::{Shell, cmd};

use crate::cases::{Case, Page};
use crate::image::{self, BASE, FAULTS, PAGE_SIZE};
use crate::recording::{Exit, Permission, Record};

/// The words that the program sends for a case.
const WORDS: usize = 3 + 4 * FAULTS + 1;

/// The syndrome of the `hvc #0` that ends a case.
const END: u64 = 0x16 << 26 | 1 << 25;

/// Returns the version that QEMU prints.
pub(crate) fn version(sh: &Shell) -> anyhow::Result<String> {
    let version = cmd!(sh, "qemu-system-aarch64 --version").quiet().read()?;
    let first = version.lines().next().context("QEMU prints no version")?;
    Ok(first.to_owned())
}

/// Executes `cases` in a new machine.
pub(crate) fn execute(sh: &Shell, cases: &[Case]) -> anyhow::Result<Vec<Record>> {
    let dir = sh.create_temp_dir()?;
    let file = |extension| dir.path().join("host").with_extension(extension);
    let (source, object, code, image) = (file("s"), file("o"), file("code"), file("image"));
    sh.write_file(&source, image::source(cases))?;
    cmd!(
        sh,
        "llvm-mc -triple=aarch64-none-elf -mattr=+v8.2a -filetype=obj -o {object} {source}"
    )
    .quiet()
    .run()?;
    cmd!(
        sh,
        "llvm-objcopy -O binary --only-section=.text {object} {code}"
    )
    .quiet()
    .run()?;
    let program = sh.read_binary_file(code)?;
    let bytes = image::image(&program).context("the program is too large for its pages")?;
    sh.write_file(&image, bytes)?;
    let image = image.display();
    let loaded = format!("loader,file={image},addr={BASE:#x},force-raw=on");
    let started = format!("loader,addr={BASE:#x},cpu-num=0");
    let machine = "virt,virtualization=on,gic-version=3";
    let output = cmd!(
        sh,
        "timeout 120 qemu-system-aarch64 -M {machine} -cpu max -accel tcg -m 64M -nodefaults
        -display none -serial stdio -device {loaded} -device {started}"
    )
    .quiet()
    .output()
    .context("QEMU failed, or the machine did not switch itself off")?;
    records(cases, &output.stdout)
}

fn records(cases: &[Case], sent: &[u8]) -> anyhow::Result<Vec<Record>> {
    let size = WORDS * 8;
    ensure!(
        sent.len() == cases.len() * size,
        "the program sent {} bytes for {} cases of {size} bytes",
        sent.len(),
        cases.len()
    );
    let results = cases.iter().zip(sent.chunks_exact(size));
    results
        .map(|(case, sent)| {
            let words = sent.as_chunks().0.iter().copied();
            let words: Vec<_> = words.map(u64::from_le_bytes).collect();
            record(case, &words).with_context(|| format!("{case:?}"))
        })
        .collect()
}

fn record(case: &Case, words: &[u64]) -> anyhow::Result<Record> {
    let &[last, own, count, ref faults @ .., changed] = words else {
        unreachable!("the caller has counted the words");
    };
    ensure!(
        last == END,
        "ended by {last:#x} after {count} faults; ESR_EL1 is {own:#x}, and the faults {faults:x?}"
    );
    let exits = faults.as_chunks().0.iter().take(count as usize);
    let exits = exits.map(|&[syndrome, virtual_address, hpfar, descriptor]| {
        // FIPA, bits 39 to 4, is the address from bit 12 on.
        let guest_physical_page = (hpfar >> 4 << 12) & !(PAGE_SIZE - 1);
        let page = Page::at(guest_physical_page)
            .with_context(|| format!("a fault at {guest_physical_page:#x}"))?;
        anyhow::Ok(Exit {
            syndrome,
            virtual_address,
            guest_physical_page,
            page,
            lacks: Permission::lacking(descriptor)
                .with_context(|| format!("a fault on a page with all permissions: {page:?}"))?,
        })
    });
    let exits = exits.collect::<anyhow::Result<_>>()?;
    let is_changed = |page: &Page| changed >> *page as u32 & 1 != 0;
    Ok(Record {
        case: case.clone(),
        exits,
        changed: Page::ALL.into_iter().filter(is_changed).collect(),
    })
}
