// The program at exception level 2 of an emulated machine. For each case it write-protects pages in
// stage 2, lets the guest execute an instruction at exception level 1, and sends what happened to
// the serial port. Cases use x0 to x15, and this program the other registers.
//
//   x28  the case                          x25  faults so far
//   x27  end of the cases                  x24  the faults, as four words each

        ldr     x16, ={HCR}
        msr     hcr_el2, x16
        mov     x16, #0x33ff            // CPTR_EL2: vector registers don't trap.
        msr     cptr_el2, x16
        ldr     x16, ={VTCR}
        msr     vtcr_el2, x16
        ldr     x16, ={STAGE_2}
        msr     vttbr_el2, x16
        adr     x16, host_vectors
        msr     vbar_el2, x16
        adr     x16, guest_vectors
        msr     vbar_el1, x16
        ldr     x16, ={MAIR}
        msr     mair_el1, x16
        ldr     x16, ={TCR}
        msr     tcr_el1, x16
        ldr     x16, ={GUEST_TABLE}
        msr     ttbr0_el1, x16
        mov     x16, #(3 << 20)         // CPACR_EL1.FPEN
        msr     cpacr_el1, x16
        ldr     x16, ={SCTLR}
        msr     sctlr_el1, x16
        adr     x28, cases
        adr     x27, cases_end

next:   cmp     x28, x27
        b.eq    off
        // The pages and their permissions are those of the image.
        ldr     x16, ={TESTED}
        ldr     x17, ={COPIES}
        ldr     x18, ={TESTED_SIZE}
1:      ldp     x19, x20, [x17], #16
        stp     x19, x20, [x16], #16
        subs    x18, x18, #16
        b.ne    1b
        ldr     x16, ={TESTED_ENTRIES}
        ldr     x17, ={ENTRY_COPIES}
        mov     x18, #{PAGES}
1:      ldr     x19, [x17], #8
        str     x19, [x16], #8
        subs    x18, x18, #1
        b.ne    1b
        bl      flush
        adr     x24, faults
        mov     x25, #0
        ldp     x16, x0, [x28]          // The instruction, and its address operand.
        adr     x17, cases
        add     x16, x16, x17
        msr     elr_el2, x16
        ldr     x16, [x28, #16]
        msr     ttbr1_el1, x16
        mov     x16, #0x3c5             // SPSR_EL2: EL1 with SP_EL1; D, A, I and F masked.
        msr     spsr_el2, x16
        ldr     x1, ={PATTERN}
        mov     x2, x1
        mov     x3, x1
        mov     x4, #4
        mov     x5, #5
        movi    v0.2d, #0
        movi    v1.2d, #0
        movi    v2.2d, #0
        movi    v3.2d, #0
        isb
        eret

// Forgets translations and code.
flush:  dsb     sy
        tlbi    alle1
        ic      iallu
        dsb     sy
        isb
        ret

// An exception of the guest: a fault, which permissions resolve, or the end of the case.
exception:
        mrs     x16, esr_el2
        lsr     x17, x16, #26
        cmp     x17, #0x20
        b.eq    1f
        cmp     x17, #0x24
        b.ne    report
1:      cmp     x25, #{FAULTS}
        b.eq    report
        mrs     x17, far_el2
        mrs     x18, hpfar_el2
        lsr     x19, x18, #4            // HPFAR_EL2.FIPA is the address from bit 12 on.
        lsr     x19, x19, #({PAGE_BITS} - 12)
        lsl     x21, x19, #{PAGE_BITS}
        ldr     x20, ={RAM}
        sub     x19, x19, x20, lsr #{PAGE_BITS}
        ldr     x20, ={STAGE_2_PAGES}
        ldr     x22, [x20, x19, lsl #3] // The descriptor.
        stp     x16, x17, [x24]
        stp     x18, x22, [x24, #16]
        add     x24, x24, #32
        add     x25, x25, #1
        // Map an unmapped page for a read, and permit everything otherwise.
        ldr     x18, ={PROTECTED}
        cbnz    x22, 1f
        tbz     x16, #6, 2f             // WnR
1:      ldr     x18, ={PERMITTED}
2:      orr     x18, x18, x21
        str     x18, [x20, x19, lsl #3]
        bl      flush
        eret

// Sends: the last syndrome, the guest's own syndrome, the number of faults, the faults, and which
// pages have changed.
report: bl      send
        mrs     x16, esr_el1
        bl      send
        mov     x16, x25
        bl      send
        adr     x24, faults
        mov     x25, #(4 * {FAULTS})
1:      ldr     x16, [x24], #8
        bl      send
        subs    x25, x25, #1
        b.ne    1b
        ldr     x17, ={TESTED}
        ldr     x18, ={COPIES}
        mov     x16, #0
        mov     x19, #1                 // The page's bit.
        mov     x20, #{PAGES}
page:   mov     x21, #(1 << {PAGE_BITS})
word:   ldr     x22, [x17], #8
        ldr     x23, [x18], #8
        cmp     x22, x23
        b.eq    1f
        orr     x16, x16, x19
1:      subs    x21, x21, #8
        b.ne    word
        lsl     x19, x19, #1
        subs    x20, x20, #1
        b.ne    page
        bl      send
        add     x28, x28, #24
        b       next

// Sends the word x16 to the serial port, the lowest byte first.
send:   ldr     x21, =0x9000000
        mov     x22, #8
1:      strb    w16, [x21]
        lsr     x16, x16, #8
        subs    x22, x22, #1
        b.ne    1b
        ret

off:    ldr     x0, =0x84000008         // PSCI SYSTEM_OFF
        smc     #0
        b       off

        .p2align 11
host_vectors:
        .org    host_vectors + 0x200    // From this program: there is no such exception.
        b       off
        .org    host_vectors + 0x400    // From the guest.
        b       exception
        .org    host_vectors + 0x600

        .p2align 11
guest_vectors:
        .org    guest_vectors + 0x200   // From the guest itself.
        hvc     #1
        .org    guest_vectors + 0x600

        .p2align 3
faults: .zero   32 * {FAULTS}
        .ltorg
