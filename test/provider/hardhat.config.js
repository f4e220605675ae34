// For chain.js. Blocks are made when the test says so.
module.exports = {
  networks: {
    hardhat: {
      chainId: 31337,
      mining: { auto: false, interval: 0 },
      accounts: [{ privateKey: `0x${'11'.repeat(32)}`, balance: `1${'0'.repeat(24)}` }],
    },
  },
};
