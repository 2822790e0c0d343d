// What the symbol table of a kernel's own file tells, without a macro around every kernel: its name
// (a kernel is a hidden function, so the dynamic linker does not know it), and its static shared
// variables (simt.h makes thread_local ones of them).
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "emulator/control.h"

namespace fused::emulator {
namespace {

struct Symbols {
  std::unordered_map<uintptr_t, std::string> functions;  // mangled, by address within the file
  std::unordered_map<std::string, Range> thread_locals;  // by mangled name; within their block
};

template <class T>
const T* view_at(const std::vector<char>& file, size_t offset, size_t count = 1) {
  if (offset > file.size() || count > (file.size() - offset) / sizeof(T)) return nullptr;
  return reinterpret_cast<const T*>(file.data() + offset);
}

Symbols read_symbols(const char* path) {
  std::ifstream stream(path, std::ios::binary);
  const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
  Symbols symbols;
  const auto* header = view_at<ElfW(Ehdr)>(file, 0);
  if (!header) return symbols;
  const auto* sections = view_at<ElfW(Shdr)>(file, header->e_shoff, header->e_shnum);
  if (!sections) return symbols;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const size_t count = sections[i].sh_size / sizeof(ElfW(Sym));
    const auto* entries = view_at<ElfW(Sym)>(file, sections[i].sh_offset, count);
    const auto& strings = sections[sections[i].sh_link];
    const auto* names = view_at<char>(file, strings.sh_offset, strings.sh_size);
    if (!entries || !names) continue;
    for (size_t s = 0; s < count; ++s) {
      if (entries[s].st_name >= strings.sh_size) continue;
      const char* const name = names + entries[s].st_name;
      const int type = entries[s].st_info & 0xf;
      if (type == STT_FUNC) symbols.functions.emplace(entries[s].st_value, name);
      if (type == STT_TLS) {
        symbols.thread_locals.emplace(name, Range{entries[s].st_value, entries[s].st_size});
      }
    }
  }
  return symbols;
}

std::string demangled(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  return name;
}

// "void f<int>(Params)" to "f<int>": a template's demangled name starts with its return type.
std::string without_signature(std::string name) {
  if (!name.empty() && name.back() == ')') {
    size_t open = name.size() - 1;
    for (int depth = 1; depth > 0 && open > 0;) {
      --open;
      depth += name[open] == ')' ? 1 : name[open] == '(' ? -1 : 0;
    }
    name.resize(open);
  }
  return name.rfind("void ", 0) == 0 ? name.substr(5) : name;
}

// "a::f<b::c>" to "f".
std::string base_name(std::string name) {
  name.resize(std::min(name.find('<'), name.size()));
  return name.substr(name.rfind(':') + 1);
}

const Symbols& symbols_of(const char* path) {
  static std::mutex mutex;
  static auto& files = *new std::unordered_map<std::string, Symbols>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto file = files.find(path);
  if (file == files.end()) file = files.emplace(path, read_symbols(path)).first;
  return file->second;
}

Kernel look_up(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_fname) return {"unknown kernel", {}};
  const Symbols& symbols = symbols_of(info.dli_fname);
  // An executable that is not position-independent is linked to absolute addresses.
  const auto address = reinterpret_cast<uintptr_t>(kernel);
  const auto base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  for (const uintptr_t key : {address - base, address}) {
    const auto symbol = symbols.functions.find(key);
    if (symbol == symbols.functions.end()) continue;
    Kernel found{without_signature(demangled(symbol->second)), {}};
    // A variable of function _ZN1fE has a name that begins with _ZZN1fEE.
    const std::string prefix = "_ZZ" + symbol->second.substr(2) + "E";
    for (const auto& [name, range] : symbols.thread_locals) {
      if (name.rfind(prefix, 0) == 0) found.static_shared.push_back(range);
    }
    return found;
  }
  return {"unknown kernel", {}};
}

}  // namespace

const Kernel& kernel_at(const void* address) {
  static std::mutex mutex;
  static auto& kernels = *new std::unordered_map<const void*, Kernel>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto kernel = kernels.find(address);
  if (kernel == kernels.end()) kernel = kernels.emplace(address, look_up(address)).first;
  return kernel->second;
}

Range this_threads_variables() {
  // A library opened at run time has no such variables in a thread until one of them is used.
  static thread_local volatile char used;
  used = 1;
  Range found;
  const auto note = [](dl_phdr_info* library, size_t, void* found) {
    Dl_info self;
    dladdr(reinterpret_cast<void*>(&this_threads_variables), &self);
    if (reinterpret_cast<uintptr_t>(self.dli_fbase) != library->dlpi_addr) return 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      if (library->dlpi_phdr[i].p_type != PT_TLS) continue;
      *static_cast<Range*>(found) = {reinterpret_cast<uintptr_t>(library->dlpi_tls_data),
                                     library->dlpi_phdr[i].p_memsz};
    }
    return 1;
  };
  dl_iterate_phdr(note, &found);
  return found;
}

std::vector<std::string> instances_of(const std::vector<std::string>& names) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&instances_of), &info)) return {};
  std::vector<std::string> instances;
  for (const auto& [address, mangled] : symbols_of(info.dli_fname).functions) {
    if (mangled.find('.') != std::string::npos) continue;  // a part that the compiler split off
    if (mangled.rfind("_ZZ", 0) == 0) continue;            // a lambda of a kernel, not the kernel
    const std::string name = without_signature(demangled(mangled));
    const bool wanted = std::find(names.begin(), names.end(), base_name(name)) != names.end();
    if (wanted) instances.push_back(name);
  }
  std::sort(instances.begin(), instances.end());
  return instances;
}

}  // namespace fused::emulator
