//! The kernel's interface, from `linux-raw-sys`, and the constants that it lacks.
//!
//! The generated bindings have all structures and the numbers of the operations, but not the
//! constants that the kernel's header `include/uapi/linux/userfaultfd.h` defines by casts. These
//! are defined here and nowhere else.

pub(crate) use linux_raw_sys::general::{
    _UFFDIO_API, _UFFDIO_CONTINUE, _UFFDIO_COPY, _UFFDIO_MOVE, _UFFDIO_POISON, _UFFDIO_REGISTER,
    _UFFDIO_UNREGISTER, _UFFDIO_WAKE, _UFFDIO_WRITEPROTECT, _UFFDIO_ZEROPAGE, UFFDIO,
    USERFAULTFD_IOC,
};

/// `USERFAULTFD_IOC_NEW` is `_IO(USERFAULTFD_IOC, 0x00)`.
pub(crate) const IOC_NEW_NUMBER: u32 = 0x00;

/// `UFFDIO_COPY_MODE_DONTWAKE`, and the same for `ZEROPAGE`, `CONTINUE` and `POISON`.
pub(crate) const FILL_MODE_DONTWAKE: u64 = 1 << 0;
/// `UFFDIO_COPY_MODE_WP` and `UFFDIO_CONTINUE_MODE_WP`.
pub(crate) const FILL_MODE_WP: u64 = 1 << 1;

pub(crate) const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
pub(crate) const WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;

pub(crate) const MOVE_MODE_DONTWAKE: u64 = 1 << 0;
pub(crate) const MOVE_MODE_ALLOW_SRC_HOLES: u64 = 1 << 1;

/// The structures have the sizes of the kernel's, and the modes and request numbers agree with the
/// generated ones where those exist.
mod checks {
    use linux_raw_sys::general::{
        UFFDIO_COPY_MODE_DONTWAKE, UFFDIO_COPY_MODE_WP, UFFDIO_ZEROPAGE_MODE_DONTWAKE, uffd_msg,
        uffdio_api, uffdio_continue, uffdio_copy, uffdio_move, uffdio_poison, uffdio_range,
        uffdio_register, uffdio_writeprotect, uffdio_zeropage,
    };
    use linux_raw_sys::ioctl;
    use nix::{request_code_read, request_code_readwrite};

    use super::*;

    const _: () = assert!(size_of::<uffd_msg>() == 32);
    const _: () = assert!(size_of::<uffdio_api>() == 24);
    const _: () = assert!(size_of::<uffdio_range>() == 16);
    const _: () = assert!(size_of::<uffdio_register>() == 32);
    const _: () = assert!(size_of::<uffdio_copy>() == 40);
    const _: () = assert!(size_of::<uffdio_zeropage>() == 32);
    const _: () = assert!(size_of::<uffdio_writeprotect>() == 24);
    const _: () = assert!(size_of::<uffdio_continue>() == 32);
    const _: () = assert!(size_of::<uffdio_poison>() == 32);
    const _: () = assert!(size_of::<uffdio_move>() == 40);

    const _: () = assert!(FILL_MODE_DONTWAKE == UFFDIO_COPY_MODE_DONTWAKE as u64);
    const _: () = assert!(FILL_MODE_DONTWAKE == UFFDIO_ZEROPAGE_MODE_DONTWAKE as u64);
    const _: () = assert!(FILL_MODE_WP == UFFDIO_COPY_MODE_WP as u64);

    macro_rules! same_request {
        ($macro:ident, $number:ident, $ty:ty, $generated:ident) => {
            const _: () =
                assert!($macro!(UFFDIO, $number, size_of::<$ty>()) as u32 == ioctl::$generated);
        };
    }
    same_request!(request_code_readwrite, _UFFDIO_API, uffdio_api, UFFDIO_API);
    same_request!(
        request_code_readwrite,
        _UFFDIO_REGISTER,
        uffdio_register,
        UFFDIO_REGISTER
    );
    same_request!(
        request_code_read,
        _UFFDIO_UNREGISTER,
        uffdio_range,
        UFFDIO_UNREGISTER
    );
    same_request!(request_code_read, _UFFDIO_WAKE, uffdio_range, UFFDIO_WAKE);
    same_request!(
        request_code_readwrite,
        _UFFDIO_COPY,
        uffdio_copy,
        UFFDIO_COPY
    );
    same_request!(
        request_code_readwrite,
        _UFFDIO_ZEROPAGE,
        uffdio_zeropage,
        UFFDIO_ZEROPAGE
    );
    same_request!(
        request_code_readwrite,
        _UFFDIO_WRITEPROTECT,
        uffdio_writeprotect,
        UFFDIO_WRITEPROTECT
    );
    same_request!(
        request_code_readwrite,
        _UFFDIO_CONTINUE,
        uffdio_continue,
        UFFDIO_CONTINUE
    );
}
