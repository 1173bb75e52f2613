// What the int8 convolutions read: an image as bytes, a group's channels padded to words, in a frame that
// holds the padding. What a kernel tap reads is then, for neighbouring outputs, words at one distance; a
// vertical stride is taken out by sorting the frame's rows by their remainder.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/int8.h"
#include "ops/conv.h"

namespace pared {

class ConvImage {
 public:
  // Quantises image n into `words`, this->words() of them, the padding included, and returns its scale: NaN
  // for an image that holds a NaN or an infinity (static: in a row that a tap reads). Dynamic: one scale an
  // image, s = max|x| / 127, and 0 for an image that counts as zero; static: the given one. u = clamp(round(x
  // * (1 / s)) + zero, low, high), to the nearest even integer.
  float quantize(int64_t n, const ActivationRange& range, uint32_t* words) const;
  virtual int64_t words() const = 0;

 protected:
  // For the arguments of a call, which are borrowed, and the header of its weight.
  ConvImage(const ConvArgs& args, const PackedHeader& h);
  ConvImage(const ConvImage&) = delete;
  ~ConvImage() = default;
  // Writes everything; the largest magnitude that was read, as bits.
  virtual uint32_t write(const char* image, float scale, const ActivationRange& range,
                         uint32_t* words) const = 0;

  const ConvArgs& a_;
  int64_t kw_, groups_, channels_, group_words_;
  int64_t rows_;                 // of the padded image, for each remainder of the stride
  std::vector<bool> read_rows_;  // by remainder of the stride: whether a tap reads them

 private:
  float scale_of(const char* image) const;
};

// Pixel by pixel.
class ConvFrame : public ConvImage {
 public:
  ConvFrame(const ConvArgs& args, const PackedHeader& h);

  int64_t words() const override { return a_.stride_h * rows_ * pitch_ * pixel_words_; }
  int64_t group_words() const { return group_words_; }

  // Outputs are numbered with this many a row, of which out_w are real.
  int64_t outputs_a_row() const { return pitch_ / a_.stride_w; }
  int64_t positions() const { return (a_.out_h - 1) * outputs_a_row() + a_.out_w; }
  int64_t position_words() const { return a_.stride_w * pixel_words_; }
  // Word that output 0 reads for a unit of the reduction, and how many units lie behind each other from it
  // on, as long as they are of one kernel row.
  int64_t unit(int64_t u, int64_t* run) const;

 private:
  uint32_t write(const char* image, float scale, const ActivationRange& range,
                 uint32_t* words) const override;

  int64_t row_units_, pitch_, pixel_words_;
  bool taps_touch_;  // the taps of a kernel row lie behind each other
};

// Plane by plane, of channel planes (nchw): words of four channels, the remainders of both strides apart, so
// that a tap reads neighbouring words for neighbouring outputs.
class ConvPlanes : public ConvImage {
 public:
  ConvPlanes(const ConvArgs& args, const PackedHeader& h);

  int64_t words() const override { return groups_ * group_words_ * plane_; }
  int64_t group_words() const { return group_words_; }
  int64_t plane_words() const { return plane_; }  // between the units of a tap

  // Outputs are numbered with this many a row, of which out_w are real. A vector of 16 of them may be read
  // from any on.
  int64_t outputs_a_row() const { return pitch_; }
  int64_t positions() const { return (a_.out_h - 1) * pitch_ + a_.out_w; }
  // Words from a plane's first one to what each tap reads for output 0.
  const std::vector<int64_t>& taps_at() const { return taps_at_; }
  // Different words of a plane that the taps read for `outputs` neighbouring outputs.
  int64_t words_read(int64_t outputs) const;

 private:
  uint32_t write(const char* image, float scale, const ActivationRange& range,
                 uint32_t* words) const override;

  int64_t pitch_, part_, plane_;  // words of a row, of a pair of remainders, of everything
  std::vector<bool> read_columns_;
  std::vector<int64_t> taps_at_;
};

}  // namespace pared
