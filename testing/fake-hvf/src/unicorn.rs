//! The functions of Unicorn that this crate calls, loaded at run time (`unicorn/unicorn.h`).

use std::ffi::{CStr, c_int, c_void};
use std::mem::transmute_copy;
use std::ops::Range;
use std::ptr;
use std::sync::OnceLock;

/// `uc_engine *`
pub(crate) type RawEngine = *mut c_void;

/// The numbers of `unicorn.h` and `arm64.h`.
const ARCH_ARM64: c_int = 2;
const CPU_MAX: c_int = 3;
const CTL_CPU_MODEL: c_int = 7 | 1 << 26 | 1 << 30;
const CTL_FORGET_CODE: c_int = 9 | 2 << 26 | 1 << 30;
pub(crate) const READ_AND_FETCH: u32 = 0b101;

pub(crate) mod hook {
    pub(crate) const INTERRUPT: i32 = 1;
    pub(crate) const INSTRUCTION_OF: i32 = 1 << 1;
    pub(crate) const EACH_INSTRUCTION: i32 = 1 << 2;
    /// Accesses of every kind that are not permitted or not mapped.
    pub(crate) const INVALID_MEMORY: i32 = 0b11_1111 << 4;
    pub(crate) const MRS: i32 = 1;
    pub(crate) const MSR: i32 = 2;
    pub(crate) const SYS: i32 = 3;
}

pub(crate) mod access {
    pub(crate) const READ_UNMAPPED: i32 = 19;
    pub(crate) const WRITE_UNMAPPED: i32 = 20;
    pub(crate) const FETCH_UNMAPPED: i32 = 21;
    pub(crate) const WRITE_PROTECTED: i32 = 22;
}

/// A register by Unicorn's number.
pub(crate) mod register {
    pub(crate) const X29: i32 = 1;
    pub(crate) const X30: i32 = 2;
    pub(crate) const SP: i32 = 4;
    pub(crate) const Q0: i32 = 104;
    pub(crate) const X0: i32 = 199;
    pub(crate) const PC: i32 = 260;
    pub(crate) const PSTATE: i32 = 265;
    pub(crate) const SYSTEM: i32 = 290;
    pub(crate) const FPCR: i32 = 291;
    pub(crate) const FPSR: i32 = 292;
}

/// A system register and its value: `uc_arm64_cp_reg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct SystemRegister {
    crn: u32,
    crm: u32,
    op0: u32,
    op1: u32,
    op2: u32,
    pub value: u64,
}

impl SystemRegister {
    /// Returns the register with an encoding as in `hv_sys_reg_t`.
    pub(crate) fn new(encoding: u16, value: u64) -> Self {
        let field = |from: u32, bits: u32| u32::from(encoding) >> from & ((1 << bits) - 1);
        Self {
            crn: field(7, 4),
            crm: field(3, 4),
            op0: field(14, 2),
            op1: field(11, 3),
            op2: field(0, 3),
            value,
        }
    }

    pub(crate) fn encoding(&self) -> u16 {
        (self.op0 << 14 | self.op1 << 11 | self.crn << 7 | self.crm << 3 | self.op2) as u16
    }
}

/// An error of Unicorn (`uc_err`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnicornError(pub c_int);

fn check(code: c_int) -> Result<(), UnicornError> {
    match code {
        0 => Ok(()),
        code => Err(UnicornError(code)),
    }
}

struct Functions {
    open: unsafe extern "C" fn(c_int, c_int, *mut RawEngine) -> c_int,
    close: unsafe extern "C" fn(RawEngine) -> c_int,
    control: unsafe extern "C" fn(RawEngine, c_int, ...) -> c_int,
    reg_read: unsafe extern "C" fn(RawEngine, c_int, *mut c_void) -> c_int,
    reg_write: unsafe extern "C" fn(RawEngine, c_int, *const c_void) -> c_int,
    hook_add: unsafe extern "C" fn(
        RawEngine,
        *mut usize,
        c_int,
        *mut c_void,
        *mut c_void,
        u64,
        u64,
        ...
    ) -> c_int,
    mem_map_ptr: unsafe extern "C" fn(RawEngine, u64, usize, u32, *mut c_void) -> c_int,
    mem_unmap: unsafe extern "C" fn(RawEngine, u64, usize) -> c_int,
    emu_start: unsafe extern "C" fn(RawEngine, u64, u64, u64, usize) -> c_int,
    emu_stop: unsafe extern "C" fn(RawEngine) -> c_int,
}

const LIBRARY: &CStr = c"libunicorn.so.2";

fn functions() -> &'static Functions {
    static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
    FUNCTIONS.get_or_init(|| {
        // SAFETY: the name ends with a zero byte. Unicorn's initialization has no requirements.
        let library = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW) };
        assert!(
            !library.is_null(),
            "{LIBRARY:?} cannot be loaded: install libunicorn-dev (`cargo xtask fake-hvf` does)"
        );
        let symbol = |name: &CStr| -> *mut c_void {
            // SAFETY: the library is loaded, and the name ends with a zero byte.
            let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
            assert!(!symbol.is_null(), "{LIBRARY:?} has no {name:?}");
            symbol
        };
        macro_rules! load {
            ($name:literal) => {{
                let symbol = symbol($name);
                // SAFETY: the field that takes the pointer has the type that unicorn.h declares
                // for this function.
                unsafe { transmute_copy(&symbol) }
            }};
        }
        Functions {
            open: load!(c"uc_open"),
            close: load!(c"uc_close"),
            control: load!(c"uc_ctl"),
            reg_read: load!(c"uc_reg_read"),
            reg_write: load!(c"uc_reg_write"),
            hook_add: load!(c"uc_hook_add"),
            mem_map_ptr: load!(c"uc_mem_map_ptr"),
            mem_unmap: load!(c"uc_mem_unmap"),
            emu_start: load!(c"uc_emu_start"),
            emu_stop: load!(c"uc_emu_stop"),
        }
    })
}

/// An emulated processor. It is used by one thread, which owns it or runs in one of its callbacks.
pub(crate) struct Engine {
    raw: RawEngine,
}

impl Engine {
    /// Creates a processor with all instructions that Unicorn knows.
    pub(crate) fn new() -> Result<Self, UnicornError> {
        let (functions, mut raw) = (functions(), ptr::null_mut());
        // SAFETY: the address is of a variable.
        check(unsafe { (functions.open)(ARCH_ARM64, 0, &raw mut raw) })?;
        let engine = Self { raw };
        // SAFETY: the engine was just opened. This control takes an int.
        check(unsafe { (functions.control)(raw, CTL_CPU_MODEL, CPU_MAX) })?;
        Ok(engine)
    }

    pub(crate) fn read<T: Copy + Default>(&self, register: i32) -> Result<T, UnicornError> {
        let mut value = T::default();
        let to = (&raw mut value).cast();
        // SAFETY: the callers pass a type as large as the register: 16 bytes for Q0 to Q31, 8 for
        // others, of which Unicorn writes 4 or 8.
        check(unsafe { (functions().reg_read)(self.raw, register, to) })?;
        Ok(value)
    }

    pub(crate) fn write<T: Copy>(&self, register: i32, value: T) -> Result<(), UnicornError> {
        let from = (&raw const value).cast();
        // SAFETY: as for `read`.
        check(unsafe { (functions().reg_write)(self.raw, register, from) })
    }

    pub(crate) fn read_system(&self, encoding: u16) -> Result<u64, UnicornError> {
        let mut register = SystemRegister::new(encoding, 0);
        let to = (&raw mut register).cast();
        // SAFETY: this register takes the structure, which names a system register.
        check(unsafe { (functions().reg_read)(self.raw, register::SYSTEM, to) })?;
        Ok(register.value)
    }

    pub(crate) fn write_system(&self, encoding: u16, value: u64) -> Result<(), UnicornError> {
        self.write(register::SYSTEM, SystemRegister::new(encoding, value))
    }

    /// Adds a callback.
    ///
    /// # Safety
    /// The callback has the type that unicorn.h declares for this kind of hook, and accepts `data`
    /// for as long as the engine runs.
    pub(crate) unsafe fn hook(
        &self,
        kind: i32,
        callback: *mut c_void,
        data: *mut c_void,
        instruction: i32,
    ) -> Result<(), UnicornError> {
        let mut handle = 0;
        // A range that ends before it begins means everywhere.
        // SAFETY: the caller passes a fitting callback. The last argument is read for
        // INSTRUCTION_OF only.
        check(unsafe {
            (functions().hook_add)(
                self.raw,
                &raw mut handle,
                kind,
                callback,
                data,
                1,
                0,
                instruction,
            )
        })
    }

    /// Maps memory of this process, from which the guest may read and fetch.
    ///
    /// # Safety
    /// The memory stays mapped until it is unmapped from the engine.
    pub(crate) unsafe fn map(
        &self,
        start: u64,
        size: usize,
        host: *mut c_void,
    ) -> Result<(), UnicornError> {
        // SAFETY: the caller keeps the memory mapped.
        check(unsafe { (functions().mem_map_ptr)(self.raw, start, size, READ_AND_FETCH, host) })
    }

    pub(crate) fn unmap(&self, start: u64, size: usize) -> Result<(), UnicornError> {
        // SAFETY: the engine is not running.
        check(unsafe { (functions().mem_unmap)(self.raw, start, size) })
    }

    /// Forgets the translated code of a range that is mapped.
    pub(crate) fn forget_code(&self, range: Range<u64>) -> Result<(), UnicornError> {
        let (functions, kind) = (functions(), CTL_FORGET_CODE);
        // SAFETY: the engine is not running. This control takes two addresses.
        check(unsafe { (functions.control)(self.raw, kind, range.start, range.end) })
    }

    /// Runs the guest from `pc` on, until a callback stops it or it fails.
    pub(crate) fn run(&self, pc: u64) -> Result<(), UnicornError> {
        // SAFETY: the callbacks are those of `hook`. No address ends the run.
        check(unsafe { (functions().emu_start)(self.raw, pc, u64::MAX, 0, 0) })
    }

    /// Stops the run. For callbacks.
    pub(crate) fn stop(&self) {
        // SAFETY: the engine exists. The call fails only for engines that do not.
        unsafe { (functions().emu_stop)(self.raw) };
    }

    /// Returns the engine of a callback.
    ///
    /// The value must be forgotten, because the engine is not the callback's.
    pub(crate) fn of_callback(raw: RawEngine) -> std::mem::ManuallyDrop<Self> {
        std::mem::ManuallyDrop::new(Self { raw })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: the engine was opened and is not running.
        unsafe { (functions().close)(self.raw) };
    }
}
