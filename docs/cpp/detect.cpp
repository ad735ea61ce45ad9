// Runs a detector that `casc export --format aoti` wrote, without Python: reads binary PPM images
// (P6) and prints a line per object. docs/exporting.md says how to build it.
//
//   detect PACKAGE.pt2 IMAGE.ppm...

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

// What the program takes: [batch, height, width, channels], the largest images that fit.
struct Room {
  int64_t batch, height, width, channels;
};

struct Image {
  int64_t height, width;
  std::vector<uint8_t> pixels;  // [height, width, 3] RGB
};

using Metadata = std::unordered_map<std::string, std::string>;

Room read_room(const std::string& path, const Metadata& metadata) {
  auto found = metadata.find("casc.pixels");
  Room room{};
  if (found != metadata.end()) {
    std::istringstream(found->second) >> room.batch >> room.height >> room.width >> room.channels;
  }
  if (room.batch < 1) throw std::runtime_error(path + ": isn't written by `casc export`");
  if (room.channels != 3) {
    throw std::runtime_error(
        path + ": takes images of " + std::to_string(room.channels) + " channels, a PPM has 3");
  }
  return room;
}

// The next number of a PPM's head; comments go from # to the end of their line.
int64_t read_number(std::istream& file) {
  while (file >> std::ws && file.peek() == '#') {
    std::string comment;
    std::getline(file, comment);
  }
  int64_t number = -1;
  return file >> number ? number : -1;
}

Image read_ppm(const std::string& path, const Room& room) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": can't be opened");
  std::string kind(2, ' ');
  file.read(kind.data(), 2);
  Image image{};
  if (kind == "P6") {
    image.width = read_number(file);
    image.height = read_number(file);
  }
  if (image.width < 1 || image.height < 1 || read_number(file) != 255) {
    throw std::runtime_error(path + ": isn't a binary PPM of 8 bits (P6, 255)");
  }
  if (image.height > room.height || image.width > room.width) {
    std::ostringstream says;
    says << path << ": " << image.height << " x " << image.width
         << " pixels (height x width), but the program takes at most " << room.height << " x "
         << room.width << ": reduce it, or export with --pixels "
         << std::max(image.height, room.height) << " " << std::max(image.width, room.width);
    throw std::runtime_error(says.str());
  }
  file.get();  // The one blank after the head.
  image.pixels.resize(image.height * image.width * 3);
  auto count = static_cast<std::streamsize>(image.pixels.size());
  if (!file.read(reinterpret_cast<char*>(image.pixels.data()), count)) {
    throw std::runtime_error(path + ": ends before its last pixel");
  }
  return image;
}

void detect(
    torch::inductor::AOTIModelPackageLoader& program,
    const Metadata& metadata,
    const Room& room,
    const std::string& path) {
  Image image = read_ppm(path, room);
  auto decoded = at::from_blob(image.pixels.data(), {image.height, image.width, 3}, at::kByte);
  // The image lies in the top left corner of the first row; rows that only fill up the batch are
  // 1 x 1.
  auto pixels = at::zeros({room.batch, room.height, room.width, 3}, at::kByte);
  auto size = at::ones({room.batch, 2}, at::kLong);
  pixels[0].narrow(0, 0, image.height).narrow(1, 0, image.width).copy_(decoded);
  size[0][0] = image.height;
  size[0][1] = image.width;

  // In the order of the page's table; masks are there only if the model has them.
  std::vector<at::Tensor> found = program.run({pixels, size});
  auto boxes = found[0][0].contiguous(), scores = found[1][0].contiguous();
  auto labels = found[2][0].contiguous();
  int64_t count = found[3][0].sum().item<int64_t>();  // The valid ones come first.
  std::printf("%s: %ld objects\n", path.c_str(), static_cast<long>(count));
  for (int64_t i = 0; i < count; ++i) {
    const float* box = boxes.data_ptr<float>() + 4 * i;
    int64_t label = labels.data_ptr<int64_t>()[i];
    const std::string& name = metadata.at("casc.class." + std::to_string(label));
    std::printf(
        "%.6f  %.3f %.3f %.3f %.3f  %s",
        scores.data_ptr<float>()[i], box[0], box[1], box[2], box[3], name.c_str());
    if (found.size() > 4) {
      auto mask = found[4][0][i];
      auto on = static_cast<long>((mask >= 0.5).sum().item<int64_t>());
      std::printf("  %ld of %ld cells", on, static_cast<long>(mask.numel()));
    }
    std::printf("\n");
  }
}

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("usage: detect PACKAGE.pt2 IMAGE.ppm...");
  std::string path = argv[1];
  if (!std::ifstream(path)) throw std::runtime_error(path + ": can't be opened");
  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader program(path);
  Metadata metadata = program.get_metadata();
  Room room = read_room(path, metadata);
  for (int i = 2; i < argc; ++i) detect(program, metadata, room, argv[i]);
  return 0;
} catch (const c10::Error& error) {
  std::fprintf(stderr, "detect: %s: %s\n", argv[1], error.what_without_backtrace());
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "detect: %s\n", error.what());
  return 1;
}
