use super::*;

fn name(number: c_long, arguments: [u64; 6]) -> Option<&'static str> {
    match Class::of(number, arguments) {
        Class::Fails(kind) => Some(kind.name),
        _ => None,
    }
}

#[test]
fn calls_of_one_number_are_distinguished_by_their_arguments() {
    let open = |flags: libc::c_int| name(libc::SYS_openat, [0, 0, flags as u64, 0, 0, 0]);
    assert_eq!(open(libc::O_RDONLY), Some("openat"));
    assert_eq!(
        open(libc::O_RDWR | libc::O_CREAT | libc::O_EXCL),
        Some("creat")
    );
    let mmap = |fd: i32| name(libc::SYS_mmap, [0, 0, 0, 0, fd as u32 as u64, 0]);
    assert_eq!((mmap(3), mmap(-1)), (Some("mmap"), None));
    assert!(matches!(
        Class::of(libc::SYS_mmap, [0, 0, 0, 0, u64::MAX, 0]),
        Class::LeftOut
    ));
    assert!(matches!(
        Class::of(libc::SYS_reboot, [0; 6]),
        Class::Unknown
    ));
}

#[test]
fn call_names_are_unique_and_every_errno_has_a_name() {
    for kind in KINDS {
        assert!(
            std::ptr::eq(Kind::named(kind.name).expect("a kind"), kind),
            "{}",
            kind.name
        );
        assert!(
            !kind.errors.is_empty() || !kind.lost.is_empty(),
            "{}",
            kind.name
        );
        for error in kind.errors.iter().chain(kind.lost) {
            assert_eq!(errno(&format!("{error:?}")), Some(*error));
        }
    }
    assert_eq!(errno("ECHILD"), None);
}

#[test]
fn each_call_that_changes_a_file_can_fail_as_a_disk_does() {
    for name in [
        "creat",
        "write",
        "pwrite64",
        "fsync",
        "ftruncate",
        "renameat",
        "linkat",
    ] {
        let errors = Kind::named(name).expect("a kind").errors;
        for error in [EIO, ENOSPC, EDQUOT, EINTR, ESTALE] {
            assert!(errors.contains(&error), "{name}: {error:?}");
        }
    }
    for name in ["renameat", "renameat2", "unlinkat"] {
        assert!(
            Kind::named(name).expect("a kind").lost.contains(&ENOENT),
            "{name}"
        );
    }
}
