//! What Unicorn calls while it runs a guest.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::decode;
use crate::memory::{EXEC, READ, WRITE};
use crate::registers;
use crate::state::{State, Stop};
use crate::system_registers::OF_TRANSLATION;
use crate::unicorn::{Engine, RawEngine, SystemRegister, UnicornError, access, hook, register};

/// The number of instructions between two looks at the timer.
const TIMER_INTERVAL: u32 = 1024;

/// Adds the callbacks to an engine.
pub(super) fn add(engine: &Engine, state: NonNull<State>) -> Result<(), UnicornError> {
    let callbacks = [
        (hook::EACH_INSTRUCTION, on_instruction as *mut c_void, 0),
        (hook::INVALID_MEMORY, on_invalid_memory as *mut c_void, 0),
        (hook::INTERRUPT, on_interrupt as *mut c_void, 0),
        (hook::INSTRUCTION_OF, on_mrs as *mut c_void, hook::MRS),
        (hook::INSTRUCTION_OF, on_msr as *mut c_void, hook::MSR),
        (hook::INSTRUCTION_OF, on_sys as *mut c_void, hook::SYS),
    ];
    for (kind, callback, instruction) in callbacks {
        // SAFETY: each callback has the type of its kind in unicorn.h. The state lives as long as
        // the engine.
        unsafe { engine.hook(kind, callback, state.as_ptr().cast(), instruction) }?;
    }
    Ok(())
}

/// Returns the state of a callback.
///
/// # Safety
/// `data` is that of [`add`], and no other reference to the state exists.
unsafe fn of_callback<'a>(data: *mut c_void) -> &'a mut State {
    // SAFETY: the caller passes the pointer of `add`.
    unsafe { &mut *data.cast::<State>() }
}

/// `uc_cb_hookcode_t`, before each instruction.
extern "C" fn on_instruction(raw: RawEngine, address: u64, _size: u32, data: *mut c_void) {
    // SAFETY: Unicorn passes the pointer of `add`, and runs one callback at a time.
    let state = unsafe { of_callback(data) };
    if state.stop.is_some() {
        // The instruction before has stopped the engine, which has not looked yet.
        return Engine::of_callback(raw).stop();
    }
    state.pc = address;
    if state.shared.storing.load(Ordering::Relaxed) {
        // The store of the previous instruction is in memory.
        state.shared.storing.store(false, Ordering::Release);
    }
    let page = address >> 12;
    let engine = Engine::of_callback(raw);
    if state.translations.are_enabled() && has_other_level(&engine, state) {
        return state.stop(&engine, Stop::Attention);
    }
    if state.page != Some(page) {
        if let Err(stop) = state.access(address..=address, EXEC) {
            return state.stop(&engine, stop);
        }
        state.page = Some(page);
    }
    state.until_timer = match state.until_timer {
        0 if state.timer_is_due() => return state.stop(&engine, Stop::Attention),
        0 => TIMER_INTERVAL,
        more => more - 1,
    };
    let lines = state.lines();
    if state.shared.attention.load(Ordering::Relaxed) {
        state.stop(&engine, Stop::Attention);
    } else if lines.any() {
        let pstate = engine.read(register::PSTATE).unwrap_or(u64::MAX);
        if let Some(fiq) = lines.taken(pstate) {
            state.stop(&engine, Stop::Interrupt { fiq });
        }
    }
}

/// Returns whether the guest has changed its exception level since the engine was started.
fn has_other_level(engine: &Engine, state: &State) -> bool {
    let pstate = engine.read(register::PSTATE);
    pstate.is_ok_and(|pstate| registers::level(pstate) != state.translations.level())
}

/// `uc_cb_eventmem_t`. Returns whether the access goes on.
///
/// No store is permitted in the engine's own mappings, so each comes here first. Unicorn carries it
/// out after this returns true.
extern "C" fn on_invalid_memory(
    raw: RawEngine,
    kind: i32,
    address: u64,
    size: i32,
    _value: i64,
    data: *mut c_void,
) -> bool {
    // SAFETY: as in `on_instruction`.
    let state = unsafe { of_callback(data) };
    if state.stop.is_some() {
        // Unicorn goes on after the first refusal of an instruction that makes several accesses.
        return false;
    }
    if kind == access::FETCH_UNMAPPED {
        state.pc = address;
    }
    if state.translations.are_enabled() && has_other_level(&Engine::of_callback(raw), state) {
        state.stop = Some(Stop::Attention);
        return false;
    }
    let permission = match kind {
        access::WRITE_PROTECTED | access::WRITE_UNMAPPED => WRITE,
        access::READ_UNMAPPED => READ,
        access::FETCH_UNMAPPED => EXEC,
        other => {
            state.stop = Some(Stop::Unsupported(format!(
                "a memory access of kind {other}"
            )));
            return false;
        }
    };
    let storing = &state.shared.storing;
    storing.store(permission == WRITE, Ordering::SeqCst);
    let last = address.saturating_add(size.max(1).unsigned_abs() as u64 - 1);
    match state.access(address..=last, permission) {
        Ok(()) if kind == access::WRITE_PROTECTED => return true,
        // Mapped since the engine was started.
        Ok(()) => state.stop = Some(Stop::Attention),
        Err(stop) => state.stop = Some(stop),
    }
    state.shared.storing.store(false, Ordering::SeqCst);
    false
}

/// `uc_cb_hookintr_t`, at exceptions.
extern "C" fn on_interrupt(raw: RawEngine, number: u32, data: *mut c_void) {
    // SAFETY: as in `on_instruction`.
    let state = unsafe { of_callback(data) };
    let stop = decode::exception(
        number,
        state.pc,
        state.instruction(state.pc),
        state.trap_breakpoints,
    );
    state.stop(&Engine::of_callback(raw), stop);
}

/// `uc_cb_insn_sys_t`, at a read of a system register. Returns 1 if the instruction is done.
extern "C" fn on_mrs(
    raw: RawEngine,
    _: i32,
    register: *const SystemRegister,
    data: *mut c_void,
) -> u32 {
    // SAFETY: as in `on_instruction`, and Unicorn passes the address of a structure.
    let (state, register) = unsafe { (of_callback(data), (*register).encoding()) };
    let Some(value) = state.guest_reads(register) else {
        return 0;
    };
    if let Some(to) = registers::general(decode::register_operand(state.instruction(state.pc))) {
        let _ = Engine::of_callback(raw).write(to, value);
    }
    1
}

/// `uc_cb_insn_sys_t`, at a write of a system register. Returns 1 if the instruction is done.
extern "C" fn on_msr(
    raw: RawEngine,
    _: i32,
    register: *const SystemRegister,
    data: *mut c_void,
) -> u32 {
    // SAFETY: as in `on_mrs`.
    let (state, register) = unsafe { (of_callback(data), (*register).encoding()) };
    let from = registers::general(decode::register_operand(state.instruction(state.pc)));
    let value = from.map_or(0, |from| {
        Engine::of_callback(raw).read(from).unwrap_or_default()
    });
    let is_done = state.guest_writes(register, value);
    if OF_TRANSLATION.contains(&register) {
        let next = state.pc + 4;
        state.stop(&Engine::of_callback(raw), Stop::OtherRegime { next });
    }
    u32::from(is_done)
}

/// `uc_cb_insn_sys_t`, at a system instruction. Returns 1 if the instruction is done.
extern "C" fn on_sys(
    raw: RawEngine,
    _: i32,
    instruction: *const SystemRegister,
    data: *mut c_void,
) -> u32 {
    // SAFETY: as in `on_mrs`.
    let (state, instruction) = unsafe { (of_callback(data), (*instruction).encoding()) };
    let next = state.pc + 4;
    if decode::invalidates_code(instruction) {
        state.stop(&Engine::of_callback(raw), Stop::ForgetCode { next });
    } else if decode::invalidates_translations(instruction) {
        state.stop(&Engine::of_callback(raw), Stop::ForgetTranslations { next });
    }
    0
}

impl State {
    fn stop(&mut self, engine: &Engine, stop: Stop) {
        self.stop = Some(stop);
        engine.stop();
    }
}
