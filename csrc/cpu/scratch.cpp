// The one definition behind scratch.h that all instruction sets share; compiled once.
namespace lcattn::cpu {

extern bool poison_scratch;
bool poison_scratch = false;

}  // namespace lcattn::cpu
