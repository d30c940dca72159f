// Package testslave runs a Modbus TCP slave that is not ours (pymodbus, from
// Debian's python3-pymodbus) for tests, benchmarks and the demo's checks.
//
//	s := testslave.Start(t)
//	s.Set("holding", 0, 123)          // as the device would
//	d.Modbus = &device.ModbusDevice{Address: s.Addr}
//	s.Pause()                         // requests are swallowed
//	s.Kill(); s.Restart()             // on the same port, all registers 0
//
// Tables are "coil", "discrete", "input" and "holding", each with the addresses
// 0 to 999; the slave answers for every unit. slave.py says more.
package testslave
