"""The KVM interface, as far as one small guest needs it.

Source: the kernel's ``Documentation/virt/kvm/api.rst`` and ``include/uapi/linux/kvm.h``; structures for x86-64. The
numbers are those that ``_IO``, ``_IOR`` and ``_IOW`` of ``asm-generic/ioctl.h`` give.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from typing import Protocol, Self

import msgspec

from mica.qemu.accelerators import canary

DEVICE = "/dev/kvm"

GET_API_VERSION = 0xAE00
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_GET_SUPPORTED_CPUID = 0xC008AE05
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_SET_TSS_ADDR = 0xAE47
_SET_IDENTITY_MAP_ADDR = 0x4008AE48
_RUN = 0xAE80
_GET_REGS = 0x8090AE81
_SET_REGS = 0x4090AE82
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_SET_CPUID2 = 0x4008AE90

_REGS = struct.Struct("<18Q")  # rax rbx rcx rdx rsi rdi rsp rbp r8 … r15 rip rflags
_SEGMENT = struct.Struct("<QIH10B")  # base limit selector type present dpl db s l g avl unusable padding
_TABLE = struct.Struct("<QH6x")  # base limit
_CONTROL = struct.Struct("<7Q")  # cr0 cr2 cr3 cr4 cr8 efer apic_base
_SREGS_SIZE = 312
_CONTROL_AT = 8 * _SEGMENT.size + 2 * _TABLE.size
_CPUID_ENTRIES = 256

# struct kvm_run: where the parts are that are read here.
_EXIT_REASON_AT = 8
_EXIT_AT = 32
_IO = struct.Struct("<BBHIQ")  # direction size port count data_offset

EXIT_NAMES = {
    1: "KVM_EXIT_EXCEPTION",
    2: "KVM_EXIT_IO",
    5: "KVM_EXIT_HLT",
    6: "KVM_EXIT_MMIO",
    8: "KVM_EXIT_SHUTDOWN",
    9: "KVM_EXIT_FAIL_ENTRY",
    17: "KVM_EXIT_INTERNAL_ERROR",
}
_SUBERRORS = {1: "instruction emulation failed", 2: "simultaneous exceptions", 3: "delivery of an event", 4: "bad exit"}


class PortWrite(msgspec.Struct, frozen=True):
    """The guest wrote ``data`` to a port."""

    port: int
    data: bytes


class Halt(msgspec.Struct, frozen=True):
    """The guest stopped for another reason than a report; ``text`` names it and where it was."""

    text: str


class KvmGuest(Protocol):
    """One vCPU with the canary's memory."""

    def run(self) -> PortWrite | Halt:
        """Run until the guest wants something. May never return on a KVM that lies. Raises ``OSError``."""

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory."""

    def close(self) -> None: ...


class KvmApi(Protocol):
    """What a KVM is asked. Every method raises ``OSError`` as the system call does."""

    def api_version(self) -> int: ...

    def create(self, listing: canary.Listing, image: bytes | bytearray) -> KvmGuest:
        """A guest in long mode at ``long_mode`` of the listing, with ``image`` at its ``BASE``."""

    def close(self) -> None: ...


class LinuxKvm:
    """``/dev/kvm`` itself. Raises ``OSError`` where it cannot be opened."""

    def __init__(self, device: str = DEVICE) -> None:
        self._fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def api_version(self) -> int:
        return fcntl.ioctl(self._fd, GET_API_VERSION, 0)

    def create(self, listing: canary.Listing, image: bytes | bytearray) -> KvmGuest:
        return _Guest(self._fd, listing, image)


class _Guest:
    def __init__(self, kvm: int, listing: canary.Listing, image: bytes | bytearray) -> None:
        self._listing = listing
        self._descriptors: list[int] = []
        self._memory = mmap.mmap(-1, 2 * 1024**2)
        self._run: mmap.mmap | None = None
        try:
            self._vm = self._keep(fcntl.ioctl(kvm, _CREATE_VM, 0))
            # Intel's KVM wants pages of its own below 4 GiB, outside of every memory slot (api.rst, KVM_SET_TSS_ADDR);
            # below 2 GiB because fcntl.ioctl takes a signed int.
            fcntl.ioctl(self._vm, _SET_IDENTITY_MAP_ADDR, struct.pack("<Q", 0x7FFBC000))
            fcntl.ioctl(self._vm, _SET_TSS_ADDR, 0x7FFBD000)
            self.write(canary.BASE, bytes(image))
            view = (ctypes.c_char * len(self._memory)).from_buffer(self._memory)
            region = struct.pack("<IIQQQ", 0, 0, 0, len(self._memory), ctypes.addressof(view))
            del view
            fcntl.ioctl(self._vm, _SET_USER_MEMORY_REGION, region)
            self._vcpu = self._keep(fcntl.ioctl(self._vm, _CREATE_VCPU, 0))
            size = fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0)
            self._run = mmap.mmap(self._vcpu, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._set_cpuid(kvm)
            self._enter_long_mode()
        except BaseException:
            self.close()
            raise

    def _keep(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
        for descriptor in reversed(self._descriptors):
            os.close(descriptor)
        self._descriptors.clear()
        self._memory.close()

    def write(self, address: int, data: bytes) -> None:
        self._memory[address : address + len(data)] = data

    def _set_cpuid(self, kvm: int) -> None:
        """Offer the guest everything that this KVM says it supports."""
        table = bytearray(struct.pack("<II", _CPUID_ENTRIES, 0) + bytes(40 * _CPUID_ENTRIES))
        fcntl.ioctl(kvm, _GET_SUPPORTED_CPUID, table, True)
        count = struct.unpack_from("<I", table)[0]
        fcntl.ioctl(self._vcpu, _SET_CPUID2, table[: 8 + 40 * count], True)

    def _enter_long_mode(self) -> None:
        """Paging on, 64-bit code segment, tables of the image (Intel SDM 3A, 4.1.1 and 5.2.1)."""
        sregs = bytearray(_SREGS_SIZE)
        fcntl.ioctl(self._vcpu, _GET_SREGS, sregs, True)
        code = _SEGMENT.pack(0, 0xFFFFFFFF, canary.CODE_SELECTOR, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
        data = _SEGMENT.pack(0, 0xFFFFFFFF, canary.DATA_SELECTOR, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        # The order in struct kvm_sregs is cs ds es fs gs ss tr ldt gdt idt; tr and ldt stay as after a reset.
        for index in range(6):
            _SEGMENT.pack_into(sregs, index * _SEGMENT.size, *_SEGMENT.unpack(data if index else code))
        _TABLE.pack_into(sregs, 8 * _SEGMENT.size, canary.GDT, canary.GDT_LIMIT)
        _TABLE.pack_into(sregs, 8 * _SEGMENT.size + _TABLE.size, canary.IDT, canary.IDT_LIMIT)
        *_, cr8, _efer, apic_base = _CONTROL.unpack_from(sregs, _CONTROL_AT)
        cr0 = 0x80050033  # PG AM WP NE ET MP PE
        cr4 = 0x620  # OSXMMEXCPT OSFXSR PAE
        efer = 0x500  # LMA LME
        _CONTROL.pack_into(sregs, _CONTROL_AT, cr0, 0, canary.TABLE_A, cr4, cr8, efer, apic_base)
        fcntl.ioctl(self._vcpu, _SET_SREGS, bytes(sregs))
        registers = [0] * 18
        registers[16], registers[17] = self._listing.address("long_mode"), 2  # rip; bit 1 of rflags is always 1
        fcntl.ioctl(self._vcpu, _SET_REGS, _REGS.pack(*registers))

    def run(self) -> PortWrite | Halt:
        assert self._run is not None
        while True:
            try:
                fcntl.ioctl(self._vcpu, _RUN, 0)
                break
            except InterruptedError:  # a signal for this thread; the guest goes on
                continue
        reason = struct.unpack_from("<I", self._run, _EXIT_REASON_AT)[0]
        if EXIT_NAMES.get(reason) == "KVM_EXIT_IO":
            direction, size, port, count, offset = _IO.unpack_from(self._run, _EXIT_AT)
            if direction == 1:
                return PortWrite(port, self._run[offset : offset + size * count])
            return Halt(f"it read port {port:#x}")
        return Halt(self._describe(reason))

    def _describe(self, reason: int) -> str:
        assert self._run is not None
        name = EXIT_NAMES.get(reason, f"exit reason {reason}")
        where = self._where()
        if name == "KVM_EXIT_INTERNAL_ERROR":
            suberror, count = struct.unpack_from("<II", self._run, _EXIT_AT)
            text = f"KVM internal error, suberror {suberror} ({_SUBERRORS.get(suberror, 'unknown')}){where}"
            if suberror == 1 and count >= 3 and self._run[_EXIT_AT + 8] & 1:  # the instruction's bytes are there
                length = min(self._run[_EXIT_AT + 16], 15)
                text += f", instruction {self._run[_EXIT_AT + 17 : _EXIT_AT + 17 + length].hex(' ')}"
            return text
        if name == "KVM_EXIT_FAIL_ENTRY":
            return f"{name}: the hardware refused to enter the guest, reason {self._u64():#x}{where}"
        if name == "KVM_EXIT_MMIO":
            return f"{name} at address {self._u64():#x}, where the guest has no device{where}"
        if name == "KVM_EXIT_SHUTDOWN":
            return f"{name}: triple fault{where}"
        return f"{name}{where}"

    def _u64(self) -> int:
        assert self._run is not None
        return int(struct.unpack_from("<Q", self._run, _EXIT_AT)[0])

    def _where(self) -> str:
        registers = bytearray(_REGS.size)
        try:
            fcntl.ioctl(self._vcpu, _GET_REGS, registers, True)
        except OSError as error:
            return f" (its registers cannot be read: {error.strerror})"
        rip = _REGS.unpack(registers)[16]
        label = self._listing.label_at(rip)
        return f" at rip {rip:#x}" + (f" ({label})" if label else "")
