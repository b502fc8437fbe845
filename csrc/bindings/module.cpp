// The Python module: every kernel's raw interface, and in the emulated build the choice of the threads' order.

#include <pybind11/pybind11.h>

#ifdef SSL_IB_EMULATED
#include "../common/emulator.h"
#endif

namespace ssl_ib {
void register_gather(pybind11::module_& m);
void register_softmax(pybind11::module_& m);
}  // namespace ssl_ib

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    ssl_ib::register_gather(m);
    ssl_ib::register_softmax(m);
#ifdef SSL_IB_EMULATED
    m.def(
        "set_thread_order",
        [](const std::string& name) {
            using ssl_ib::emulator::Order;
            const std::map<std::string, Order> orders{
                {"forward", Order::forward}, {"reverse", Order::reverse}, {"random", Order::random}};
            ssl_ib::emulator::set_order(orders.at(name));
        },
        pybind11::arg("order"), "Which of the emulated threads runs next: \"forward\", \"reverse\" or \"random\".");
#endif
}
