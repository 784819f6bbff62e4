// Symbols of glibc by their oldest versions, so that what is built on a newer system runs on glibc 2.28. Only with
// FASTATTN_OLD_GLIBC, which setup.py gives to shared libraries for Linux: a static one has no versions.
#pragma once
#include <cstdint>  // and with it __GLIBC__, where it is glibc's

#if defined(FASTATTN_OLD_GLIBC) && defined(__GLIBC__)
#if defined(__x86_64__)
#define FASTATTN_OLD(name) __asm__(".symver " #name "," #name "@GLIBC_2.2.5")
FASTATTN_OLD(exp2);
FASTATTN_OLD(log2);
FASTATTN_OLD(dladdr);
FASTATTN_OLD(dlopen);
FASTATTN_OLD(dlsym);
#elif defined(__aarch64__)
#define FASTATTN_OLD(name) __asm__(".symver " #name "," #name "@GLIBC_2.17")
FASTATTN_OLD(exp2);
FASTATTN_OLD(log2);
FASTATTN_OLD(dladdr);
FASTATTN_OLD(dlopen);
FASTATTN_OLD(dlsym);
#endif
#endif
