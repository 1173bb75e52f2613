// What the int8 convolutions read: an image as bytes, pixel by pixel with a group's channels padded to words,
// in a frame that holds the padding. What a kernel tap reads is then, for neighbouring outputs, words at one
// distance; a vertical stride is taken out by sorting the frame's rows by their remainder.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/int8.h"
#include "ops/conv.h"

namespace pared {

class ConvFrame {
 public:
  // For the arguments of a call and the header of its weight; borrows the arguments.
  ConvFrame(const ConvArgs& args, const PackedHeader& h);

  // Quantises image n into `words`, this->words() of them, the padding included, and returns its scale: NaN
  // for an image that holds a NaN or an infinity (static: in a row that a tap reads). Dynamic: one scale an
  // image, s = max|x| / 127, and 0 for an image that counts as zero; static: the given one. u = clamp(round(x
  // * (1 / s)) + zero, low, high), to the nearest even integer.
  float quantize(int64_t n, const ActivationRange& range, uint32_t* words) const;

  int64_t words() const { return a_.stride_h * rows_ * pitch_ * pixel_words_; }
  int64_t group_words() const { return group_words_; }

  // Outputs are numbered with this many a row, of which out_w are real.
  int64_t outputs_a_row() const { return pitch_ / a_.stride_w; }
  int64_t positions() const { return (a_.out_h - 1) * outputs_a_row() + a_.out_w; }
  int64_t position_words() const { return a_.stride_w * pixel_words_; }
  // Word that output 0 reads for a unit of the reduction, and how many units lie behind each other from it
  // on, as long as they are of one kernel row.
  int64_t unit(int64_t u, int64_t* run) const;

 private:
  float scale_of(const char* image) const;
  uint32_t quantize_rows(const char* image, float scale, const ActivationRange& range, uint8_t* bytes) const;

  const ConvArgs& a_;
  int64_t kw_, groups_, channels_, group_words_, row_units_, rows_, pitch_, pixel_words_;
  bool taps_touch_;              // the taps of a kernel row lie behind each other
  std::vector<bool> read_rows_;  // by remainder of the stride: whether a tap reads them
};

}  // namespace pared
