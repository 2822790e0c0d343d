// CUDA's built-in vector types: two and four elements are aligned as one word.
#pragma once

namespace fused::emulator {

template <class T>
struct alignas(2 * sizeof(T)) Vector2 {
  T x, y;
};
template <class T>
struct Vector3 {
  T x, y, z;
};
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Vector4 {
  T x, y, z, w;
};

}  // namespace fused::emulator

using char2 = fused::emulator::Vector2<signed char>;
using char4 = fused::emulator::Vector4<signed char>;
using uchar2 = fused::emulator::Vector2<unsigned char>;
using uchar4 = fused::emulator::Vector4<unsigned char>;
using short2 = fused::emulator::Vector2<short>;
using short4 = fused::emulator::Vector4<short>;
using ushort2 = fused::emulator::Vector2<unsigned short>;
using ushort4 = fused::emulator::Vector4<unsigned short>;
using int2 = fused::emulator::Vector2<int>;
using int3 = fused::emulator::Vector3<int>;
using int4 = fused::emulator::Vector4<int>;
using uint2 = fused::emulator::Vector2<unsigned>;
using uint3 = fused::emulator::Vector3<unsigned>;
using uint4 = fused::emulator::Vector4<unsigned>;
using longlong2 = fused::emulator::Vector2<long long>;
using ulonglong2 = fused::emulator::Vector2<unsigned long long>;
using float2 = fused::emulator::Vector2<float>;
using float3 = fused::emulator::Vector3<float>;
using float4 = fused::emulator::Vector4<float>;
using double2 = fused::emulator::Vector2<double>;

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
