// cp.async: the destination counts as written when the copy is begun and again at the wait, and may not be touched between.
#pragma once

namespace fastdiff {

template <int n, class T, class From>
void copy_async(const Shared<T>& to, const emulation::Checked<From, false>& from, bool valid = true) {
  static_assert(sizeof(T) * n == 4 || sizeof(T) * n == 8 || sizeof(T) * n == 16);
  static_assert(std::is_same_v<std::remove_const_t<From>, T>);
  emulation::Block& b = *emulation::Block::now;
  T* at = to.check(0, n);
  b.access(at, n * sizeof(T), true);
  std::memset(static_cast<void*>(at), 0xff, n * sizeof(T));
  b.arriving(at, n * sizeof(T), true);
  b.thread().groups.back().push_back({reinterpret_cast<unsigned char*>(at),
                                      valid ? reinterpret_cast<const unsigned char*>(from.check(0, n)) : nullptr, n * sizeof(T)});
}

inline void copy_async_commit() { emulation::Block::now->thread().groups.emplace_back(); }

template <int n>
void copy_async_wait() {
  emulation::Block& b = *emulation::Block::now;
  auto& groups = b.thread().groups;
  while (groups.size() > n + 1) {
    for (const emulation::Copy& c : groups.front()) {
      b.arriving(c.to, c.bytes, false);
      b.touch(c.to, c.bytes, true);
      if (c.from) std::memcpy(c.to, c.from, c.bytes);
      else std::memset(c.to, 0, c.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace fastdiff
