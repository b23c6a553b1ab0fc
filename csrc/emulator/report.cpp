// Finds names for the code addresses in a fault's message: functions in this library's own symbol table, and source
// lines by the program addr2line, if installed.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <fstream>
#include <mutex>
#include <string>
#include <vector>

#include "emulator/machine.h"

namespace peft_ext {
namespace emulator {
namespace {

// Returns the name of the function at an offset from the library's load address. The name is read from the section
// .symtab of the library's file: kernels are not exported, so that .dynsym does not have their names.
std::string symbol_at(const char* path, uintptr_t offset) {
  std::ifstream file(path, std::ios::binary);
  const std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (data.size() < sizeof(ElfW(Ehdr))) return "";
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(data.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(data.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(data.data() + sections[i].sh_offset);
    const char* names = data.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t s = 0; s < sections[i].sh_size / sizeof(ElfW(Sym)); ++s) {
      if (symbols[s].st_value == offset && (symbols[s].st_info & 15) == STT_FUNC) return names + symbols[s].st_name;
    }
  }
  return "";
}

void erase_all(std::string& text, const std::string& part) {
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part)) text.erase(at, part.size());
}

std::string last_part(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

}  // namespace

void describe_function(const void* function, char* text, size_t bytes) {
  snprintf(text, bytes, "kernel at %p", function);
  Dl_info info;
  if (dladdr(function, &info) == 0) return;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(function) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  const std::string symbol = symbol_at(info.dli_fname, offset);
  int status = 1;
  char* demangled = symbol.empty() ? nullptr : abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  if (demangled == nullptr) return;
  std::string name = demangled;
  free(demangled);
  erase_all(name, "(anonymous namespace)::");
  erase_all(name, "peft_ext::");
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  int depth = 0;
  // Cuts the name off at the parenthesis of the function's parameters, which is outside of the template arguments.
  for (size_t i = 0; i < name.size(); ++i) {
    depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
    if (name[i] == '(' && depth == 0) name.erase(i);
  }
  snprintf(text, bytes, "%s", name.c_str());
}

void describe_site(const void* site, char* text, size_t bytes) {
  text[0] = '\0';
  Dl_info info;
  if (site == nullptr || dladdr(site, &info) == 0 || strchr(info.dli_fname, '\'') != nullptr) return;
  // `site` is a return address, which may belong to the line after the call; the address before `site` is within the
  // call.
  const uintptr_t offset = reinterpret_cast<uintptr_t>(site) - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);
  char command[1024];
  snprintf(command, sizeof(command), "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return;
  char line[512];
  while (fgets(line, sizeof(line), pipe) != nullptr) {  // addr2line prints the innermost frame first
    line[strcspn(line, " \n")] = '\0';
    const std::string place = last_part(line);
    const bool wrapper = place.rfind("ptx.cuh", 0) == 0 || place.rfind("device.h", 0) == 0;
    if (place.rfind("??", 0) == 0 || (wrapper && text[0] != '\0')) continue;
    snprintf(text, bytes, "%s", place.c_str());
    if (!wrapper) break;
  }
  pclose(pipe);
}

bool in_read_only_data(uintptr_t address, size_t bytes) {
  struct Segment {
    uintptr_t begin, end;
  };
  static std::vector<Segment> segments;
  static std::once_flag once;
  std::call_once(once, [] {
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
          const uintptr_t here = reinterpret_cast<uintptr_t>(&in_read_only_data);
          bool ours = false;
          std::vector<Segment> found;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const ElfW(Phdr) & header = info->dlpi_phdr[i];
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            const uintptr_t end = begin + header.p_memsz;
            if (header.p_type == PT_LOAD && here >= begin && here < end) ours = true;
            const bool constant = header.p_type == PT_LOAD && (header.p_flags & PF_W) == 0;
            if (constant || header.p_type == PT_GNU_RELRO) found.push_back({begin, end});
          }
          if (ours) segments = found;
          return ours ? 1 : 0;
        },
        nullptr);
  });
  for (const Segment& segment : segments) {
    if (address >= segment.begin && address + bytes <= segment.end) return true;
  }
  return false;
}

}  // namespace emulator
}  // namespace peft_ext
