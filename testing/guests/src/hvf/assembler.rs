//! LLVM's assembler, for machine code of another processor than this one.

use std::fs;
use std::process::Command;

/// Returns the machine code of AArch64 source.
///
/// # Panics
/// Panics if LLVM's tools are missing or refuse the source.
pub(super) fn assemble(source: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory for the source");
    let file = |extension| dir.path().join("source").with_extension(extension);
    let (text, object, binary) = (file("s"), file("o"), file("bin"));
    fs::write(&text, source).expect("the source is written");
    run(Command::new("llvm-mc")
        .args(["-triple=aarch64-none-elf", "-filetype=obj", "-o"])
        .args([&object, &text]));
    run(Command::new("llvm-objcopy")
        .args(["-O", "binary", "--only-section=.text"])
        .args([&object, &binary]));
    fs::read(binary).expect("llvm-objcopy wrote the code")
}

fn run(command: &mut Command) {
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}: install llvm"));
    assert!(output.status.success(), "{command:?}: {output:?}");
}
